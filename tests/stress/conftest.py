def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=20, help="attacked runs")
    parser.addoption("--seed", type=int, default=0, help="of the first round; then seed + 1, …")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("seed", 0)
        seeds = range(first, first + metafunc.config.getoption("rounds", 20))
        metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed{seed}")
