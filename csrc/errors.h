// The check of calls of LibTorch's C functions.
#pragma once

#include <torch/csrc/stable/tensor.h>

// Newer versions than torch 2.11 have this macro; it also reports the error's message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
