"""The papers' objectives, by the name of the overlay."""

from papers import completion_ratios, grpo, policy_gradients

PAPERS = {
    name: function
    for module in (grpo, completion_ratios, policy_gradients)
    for name, function in vars(module).items()
    if getattr(function, "__module__", None) == module.__name__ and not name.startswith("_")
}
