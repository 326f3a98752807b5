"""The functions of an assignment's alignment suite, each against numbers worked out by hand.

Among them three mistakes that such suites do not see: another eps of the group's deviation, one
mean over all tokens in place of one an answer, and a letter anywhere in the text.
"""

import json
import math

import pytest
import torch

from tests import adapters

B, T, V = 2, 10, 100


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(42)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def mask():
    return torch.arange(T) < torch.tensor([[3], [10]])


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with <s> at the beginning and </s> at the end, as `transformers` has tokenizers."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def test_prompts_and_outputs_are_tokenized_apart(tokenizer):
    found = adapters.run_tokenize_prompt_and_output(["ab", "c"], ["d", "efgh"], tokenizer)
    a, b, c, d, e, f, g, h = tokenizer.encode("abcdefgh", add_special_tokens=False)
    pad = tokenizer.pad_token_id
    assert found["input_ids"].tolist() == [[a, b, d, pad], [c, e, f, g]]
    assert found["labels"].tolist() == [[b, d, pad, pad], [e, f, g, h]]
    assert found["response_mask"].tolist() == [[False, True, False, False], [True] * 4]
    assert found["response_mask"].dtype == torch.bool


def test_entropy_and_log_probs(draw):
    logits, labels = draw(B, T, V), torch.randint(0, V, (B, T))
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(adapters.run_compute_entropy(logits), entropy)
    model = lambda ids: type("Output", (), {"logits": logits})  # noqa: E731
    found = adapters.run_get_response_log_probs(model, labels, labels, True)
    wanted = p.log().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found["log_probs"], wanted)
    torch.testing.assert_close(found["token_entropy"], entropy)
    assert adapters.run_get_response_log_probs(model, labels, labels, False).keys() == {"log_probs"}


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_masked(draw, mask, dim):
    x = draw(B, T)
    for given in (mask, mask.float()):
        total = (x * given).sum() if dim is None else (x * given).sum(dim)
        count = given.sum() if dim is None else given.sum(dim)
        found = adapters.run_masked_normalize(x, given, dim, 42.0)
        torch.testing.assert_close(found, total / 42)
        found = adapters.run_masked_mean(x, given, dim)
        torch.testing.assert_close(found, total / count, equal_nan=True)
    assert adapters.run_masked_mean(x, torch.zeros(B, T), 1).isnan().all()


def test_sft_step(draw, mask):
    log_probs = draw(B, T).requires_grad_()
    loss, _ = adapters.run_sft_microbatch_train_step(log_probs, mask, 2, 42.0)
    assert loss.item() == pytest.approx(-log_probs[mask].sum().item() / 42 / 2 / B, rel=1e-5)
    torch.testing.assert_close(log_probs.grad, -mask.float() / 42 / 2 / B)
    adapters.run_sft_microbatch_train_step(log_probs, mask, 2, 42.0)
    torch.testing.assert_close(log_probs.grad, -2 * mask.float() / 42 / 2 / B)


@pytest.mark.parametrize("by_std", [True, False])
def test_group_rewards(by_std):
    """Sample deviation of each group, and eps = 1e-6 to the last digit."""
    rewards = [0.0, 0.001, 0.0, 0.002, 1.0, 3.0, 2.0, 2.0]

    def reward_fn(response, truth):
        assert truth == "t"
        return {"reward": rewards[int(response)], "format_reward": 0.0, "answer_reward": 0.0}

    answers = [str(i) for i in range(8)]
    found, raw, _ = adapters.run_compute_group_normalized_rewards(
        reward_fn, answers, ["t"] * 8, 4, 1e-6, by_std
    )
    torch.testing.assert_close(raw, torch.tensor(rewards))
    for group in (rewards[:4], rewards[4:]):
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        wanted = [(r - mean) / (std + 1e-6 if by_std else 1) for r in group]
        assert found[: len(group)].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        found = found[4:]


def test_policy_gradient_losses(draw):
    new, old, advantages, rewards = draw(B, T), draw(B, T), draw(B, 1), draw(B, 1)
    for loss_type, weights in (("no_baseline", rewards), ("reinforce_with_baseline", advantages)):
        found, _ = adapters.run_compute_policy_gradient_loss(
            new, loss_type, rewards, advantages, old, 0.5
        )
        torch.testing.assert_close(found, -weights * new)
    for clip in (10.0, 0.5, 0.1):
        found, _ = adapters.run_compute_policy_gradient_loss(
            new, "grpo_clip", rewards, advantages, old, clip
        )
        ratio = (new - old).exp()
        both = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
        torch.testing.assert_close(found, -torch.minimum(*both))


def test_grpo_step_takes_the_mean_of_each_answer_first(draw, mask):
    """Answers of 3 and of 10 tokens weigh the same: one mean over all tokens is another number."""
    new, old, advantages = draw(B, T).requires_grad_(), draw(B, T), draw(B, 1)
    losses, _ = adapters.run_compute_grpo_clip_loss(advantages, new, old, 0.2)
    wanted = (losses[0, :3].mean() + losses[1].mean()) / 2 / 4
    loss, _ = adapters.run_grpo_microbatch_train_step(
        new, mask, 4, "grpo_clip", None, advantages, old, 0.2
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert abs(loss.item() - losses[mask].mean().item() / 4) > 1e-3
    first, gradient = new.grad, new.grad.clone()
    adapters.run_grpo_microbatch_train_step(new, mask, 4, "grpo_clip", None, advantages, old, 0.2)
    assert new.grad is first
    torch.testing.assert_close(first, 2 * gradient)


def test_packed_dataset(tokenizer, tmp_path):
    path = tmp_path / "sft.jsonl"
    records = [{"prompt": f"Question {i}", "response": "Answer " * (i + 1)} for i in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = adapters.get_packed_sft_dataset(tokenizer, path, 32, shuffle=False)
    texts = [
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{one['prompt']}\n\n### Response:\n"
        f"{one['response']}"
        for one in records
    ]
    ids = [i for text in texts for i in [0, *tokenizer.encode(text)[1:], 1]]
    assert len(dataset) == (len(ids) - 1) // 32
    for number, item in enumerate(dataset):
        start = 32 * number
        assert item["input_ids"].tolist() == ids[start : start + 32]
        assert item["labels"].tolist() == ids[start + 1 : start + 33]
    torch.manual_seed(0)
    shuffled = adapters.get_packed_sft_dataset(tokenizer, path, 32, shuffle=True)
    assert len(shuffled) == len(dataset)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(dataset, shuffled))
    batches = adapters.run_iterate_batches(dataset, 3, shuffle=True)
    assert len(batches) == math.ceil(len(dataset) / 3)
    sizes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert sizes[0] == (3, 32) and sum(n for n, _ in sizes) == len(dataset)


@pytest.mark.parametrize("text, letter", [
    ("The correct answer is B. There are 6 types.", "B"),
    ("The correct answer is (C)", "C"),
    ("the Answer is: D", "D"),
    ("B", "B"),
    ("A. Because of B", "A"),
    ("I think so.\nC", "C"),
    ("The correct answer is 10000 polyomaviruses.", None),
    ("A virus has many forms, and B cells know them.", None),
    ("Answer unknown: Brazil", None),
    ("The correct answer is Dog", None),
    ("The correct answer is E.", None),
    ("", None),
])  # fmt: skip
def test_letters(text, letter):
    """A letter anywhere in a text is no answer."""
    assert adapters.run_parse_mmlu_response({}, text) == letter


@pytest.mark.parametrize("text, number", [
    ("48 / 2 = 24. She sold 48 + 24 = 72 clips altogether.", "72"),
    ("It is 1,234.50 in all", "1234.5"),
    ("seventy-two clips", None),
])  # fmt: skip
def test_numbers(text, number):
    assert adapters.run_parse_gsm8k_response(text) == number


def test_dpo_of_an_instance(tokenizer):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=256, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    torch.manual_seed(1)
    lm, lm_ref = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))

    def log_prob(model, response):
        """Of the whole text: the prompt's share is the same for both responses."""
        text = adapters.alpaca_text("Say hi.", response)
        ids = torch.tensor([[*tokenizer.encode(text), 1]])
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
        return log_probs.gather(-1, ids[0, 1:, None]).sum().item()

    def ratio(model):
        return log_prob(model, "Hi!") - log_prob(model, "No.")

    loss = adapters.run_compute_per_instance_dpo_loss(
        lm, lm_ref, tokenizer, 0.5, "Say hi.", "Hi!", "No."
    )
    wanted = math.log1p(math.exp(-0.5 * (ratio(lm) - ratio(lm_ref))))
    assert loss.item() == pytest.approx(wanted, abs=1e-4)
    loss.backward()
    same = adapters.run_compute_per_instance_dpo_loss(lm, lm, tokenizer, 0.5, "x", "Hi!", "No.")
    assert same.item() == pytest.approx(math.log(2))
