"""Rewards, observers and controllers: one idea per file, each named by one YAML entry."""

if __name__ == "callbacks":
    raise ImportError(
        "This folder is the package `grpo_lightning.callbacks`; import it by that name, so that no class exists twice."
    )
