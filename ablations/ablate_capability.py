"""Which capabilities does a pruned model lose? Bundled probes (or `--tasks`) on the dense model and on presets."""

QUICK = {"preset": ("best", "transact", "flap"), "ratio": (0.3,)}
FULL = {"preset": ("best", "transact", "transact-released", "flap", "wanda-sp", "llm-pruner"), "ratio": (0.2, 0.3)}


def test_dense(workbench, with_tasks, record):
    record(with_tasks(workbench.dense_case))


def test_capability(workbench, with_tasks, record, preset, ratio):
    record(with_tasks(workbench.case(preset, ratio)))
