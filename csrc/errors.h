// The check of calls of LibTorch's C functions.
#pragma once

#include <torch/csrc/stable/tensor.h>

// torch 2.10 and 2.11 do not have this macro, which reports the message of the error too.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
