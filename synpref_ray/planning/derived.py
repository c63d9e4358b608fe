"""Throughputs that follow from a GPU's peak, a model's size and the lengths of pairs: what a plan goes by until they are measured.

Our choice throughout. A forward pass takes 2 FLOPs per weight and token, training 6, or 8 where activations are computed again; attention, some
percent at these lengths, is left out. What a GPU reaches of its peak is a setting, as are lengths: all of it is assumed, and says so.
"""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from synpref_ray.config import Settings
from synpref_ray.planning.cost import Throughputs

SECONDS_PER_HOUR = 3600.0


class PairTokens(Settings):
    """What one pair takes of a model behind an endpoint."""

    requests: NonNegativeInt = 0
    """Requests for a pair; 0: not known."""
    prompt: NonNegativeInt = 0
    """Their prompt tokens together, none of them cached."""
    output: NonNegativeInt = 0
    """Tokens of their replies together."""


class Compute(Settings):
    """Lengths of pairs, sizes of models and the speed of a GPU, from which throughputs follow where none is measured."""

    prompt_tokens: PositiveInt = 400  # ours: assumed; with replies of 600 a conversation has 1,000 tokens
    reply_tokens: PositiveInt = 600  # ours: assumed
    attribute_tokens: PositiveInt = 80  # ours: what a tagger writes, and what an exemplar shows of it: texts half as long as their bounds
    max_exemplars: NonNegativeInt = 8  # Sec. 3.2, Step 3
    judge_input_tokens: PositiveInt = 14_000  # ours: as max_input_tokens of stage1.yaml and stage2.yaml; exemplars that do not fit are left out
    guideline_tokens: PositiveInt = 600  # ours: about what the judge's full guideline takes
    tagger_instruction_tokens: PositiveInt = 500  # ours: about what the tagger's instructions and examples take
    choice_tokens: PositiveInt = 10  # ours: what an endpoint writes to name a judge's choice
    gpu_tflops: PositiveFloat = 989.0  # an H100's dense bfloat16, by its data sheet
    score_mfu: PositiveFloat = Field(default=0.4, le=1.0)  # ours: assumed
    train_mfu: PositiveFloat = Field(default=0.35, le=1.0)  # ours: assumed
    embed_mfu: PositiveFloat = Field(default=0.2, le=1.0)  # ours: assumed; small models reach less
    llm_prompt_mfu: PositiveFloat = Field(default=0.4, le=1.0)  # ours: assumed, of reading prompts with tensor parallelism over 4 GPUs
    llm_output_tokens_per_second: PositiveFloat = 500.0  # ours: assumed, a GPU's share of an engine that is kept full
    llm_billions: PositiveFloat = 72.7  # Qwen2.5-72B; where `stages` lists taggers and judges, these count
    embedder_billions: PositiveFloat = 0.6  # Qwen3-Embedding-0.6B
    reward_billions: PositiveFloat = 8.03  # Llama-3.1-8B, the best and the gold RM

    @property
    def unique_tokens(self) -> int:
        """Tokens of a pair whose replies share their prompt."""
        return self.prompt_tokens + 2 * self.reply_tokens

    @property
    def exemplars(self) -> int:
        """Exemplars that fit into a judge's prompt at these lengths."""
        one = self.unique_tokens + self.attribute_tokens
        return max(0, min(self.max_exemplars, (self.judge_input_tokens - self.guideline_tokens - one) // one))

    @property
    def judge_tokens(self) -> int:
        """Prompt tokens that an engine computes for one pair: exemplars once, since both orders begin with them, and the pair in both orders."""
        return (self.exemplars + 2) * (self.unique_tokens + self.attribute_tokens)

    def score_rate(self, billions: float) -> float:
        """Return pairs per GPU hour of one pass of a reward model of this size."""
        return self._rate(2 * billions * self.unique_tokens, self.score_mfu)

    def train_rate(self, billions: float, *, recompute: bool) -> float:
        """Return pairs per GPU hour of training a reward model of this size."""
        return self._rate((8 if recompute else 6) * billions * self.unique_tokens, self.train_mfu)

    def embed_rate(self) -> float:
        """Return pairs per GPU hour of the embedder, which reads prompt and attributes."""
        return self._rate(2 * self.embedder_billions * (self.prompt_tokens + self.attribute_tokens), self.embed_mfu)

    def tag_rate(self, billions: float) -> float:
        """Return pairs per GPU hour of a tagger; its instructions are computed once, not for every pair."""
        hours = 1 / self._rate(2 * billions * self.prompt_tokens, self.llm_prompt_mfu)
        return 1 / (hours + self.attribute_tokens / (self.llm_output_tokens_per_second * SECONDS_PER_HOUR))

    def judge_rate(self, billions: float) -> float:
        """Return pairs per GPU hour of a judge; its guideline is computed once, not for every pair."""
        return self._rate(2 * billions * self.judge_tokens, self.llm_prompt_mfu)

    @property
    def tag_request(self) -> PairTokens:
        """What tagging a pair takes of an endpoint, nothing cached."""
        return PairTokens(requests=1, prompt=self.tagger_instruction_tokens + self.prompt_tokens, output=self.attribute_tokens)

    @property
    def judge_request(self) -> PairTokens:
        """What judging a pair takes of an endpoint: both orders, each with all exemplars, nothing cached."""
        prompt = self.guideline_tokens + (self.exemplars + 1) * (self.unique_tokens + self.attribute_tokens)
        return PairTokens(requests=2, prompt=2 * prompt, output=2 * self.choice_tokens)

    def throughputs(self) -> Throughputs:
        """Return the four throughputs of a cost model."""
        return Throughputs(
            tag=self.tag_rate(self.llm_billions),
            score=self.score_rate(self.reward_billions),
            judge=self.judge_rate(self.llm_billions),
            train=self.train_rate(self.reward_billions, recompute=True),
        )

    def _rate(self, gflops: float, mfu: float) -> float:
        return self.gpu_tflops * 1000 * mfu / gflops * SECONDS_PER_HOUR
