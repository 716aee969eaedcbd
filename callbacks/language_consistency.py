"""Reward: the completion keeps to one language."""

from collections.abc import Sequence

from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rewards.scripts import SCRIPTS_OF_LANGUAGE, words_by_script
from grpo_lightning.types import Completion, ConfigurationError, Prompt, Score


class LanguageConsistency(RewardCallback):
    """The share of a completion's words that are in the target language.

    ``r = Num(words in the target language) / Num(words)``, in [0, 1]; None for a completion without words.

    Source: DeepSeek-R1 (https://arxiv.org/abs/2501.12948), on mixed languages in the chain of thought. The paper does
    not say how it tells languages apart. Here it is done by script, with the words of
    `grpo_lightning.rewards.scripts.words_by_script`. Its limits:

    * Languages of one script are not told apart: with ``en``, French counts as English.
    * A text in Chinese characters alone counts fully as Japanese, and those in a Japanese text count as Chinese.
    * In Chinese, Japanese and Thai each letter is a word, so that a mixed text counts them more than Latin words.
    * Code and names in Latin letters count against every target but those of Latin script.

    Args:
        language: The target: ar, el, en, he, hi, ja, ko, ru, th or zh.
        name: The reward's name.
        weight: Factor of this reward in a completion's total.

    Raises:
        ConfigurationError: `language` is none of these.
    """

    def __init__(self, language: str = "en", name: str = "language_consistency", weight: float = 1.0) -> None:
        super().__init__(name, weight)
        if language not in SCRIPTS_OF_LANGUAGE:
            raise ConfigurationError(
                f"LanguageConsistency.language must be one of {', '.join(SCRIPTS_OF_LANGUAGE)}, got {language!r}."
            )
        self.language = language

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:  # noqa: ARG002
        """The share for each completion."""
        return [self._score(completion.text) for completion in completions]

    def _score(self, text: str) -> Score:
        scripts = [script for _, script in words_by_script(text)]
        if not scripts:
            return None
        return sum(script in SCRIPTS_OF_LANGUAGE[self.language] for script in scripts) / len(scripts)
