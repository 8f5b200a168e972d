"""The text VAE: tokens, decoding, loss, and the quality of the tiny preset's trained weights."""

import pytest
import torch
from torch.nn import functional

from tests.models.tiny import arguments, caption_accuracy, fresh, normal, tiny
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.optimus import Optimus, _pick
from vdtrain.models.tokenizers import DecoderTokenizer, EncoderTokenizer

ENCODER, DECODER = "asset:tiny/encoder_tokenizer.json", "asset:tiny/decoder_tokenizer.json"


@pytest.fixture
def optimus() -> Optimus:
    return tiny("text", "vae")


def test_latent_shape_is_the_latent_size_at_any_resolution(optimus):
    assert optimus.latent_shape((32, 32)) == optimus.latent_shape((512, 256)) == (64,)


def test_encoder_ids_are_lowered_cut_and_padded():
    tokenizer = EncoderTokenizer(ENCODER, limit=3)
    ids = tokenizer(["A Red CIRCLE at the top", "a red circle", "red", ""])
    first, last = ids[3, 0].item(), ids[3, 1].item()
    assert ids.shape == (4, 5)
    assert torch.equal(ids[0], ids[1])
    assert ids[:, 0].eq(first).all()
    assert ids[0, -1] == last
    assert ids[2, 2:].tolist() == [last, tokenizer.pad, tokenizer.pad]


def test_lengths_are_multiples_of_16_up_to_the_limit():
    for limit, words, length in ((77, 3, 16), (77, 14, 16), (77, 15, 32), (77, 90, 79), (20, 15, 22)):
        assert EncoderTokenizer(ENCODER, limit)(["red " * words, ""]).shape == (2, length)


def test_padding_and_the_mask_change_no_latent(optimus):
    _, _, captions = fresh(16, 32)
    ids = optimus.prepare(captions)
    lengths = (ids != optimus.encoder_tokenizer.pad).sum(dim=1).tolist()
    assert max(lengths) < ids.shape[1]

    def plain(ids):
        """The latents by the mask that transformers makes; for captions of one length it makes none."""
        hidden = optimus.encoder(input_ids=ids, attention_mask=ids != optimus.encoder_tokenizer.pad).pooler_output
        return optimus.encoder.get_submodule("linear")(hidden).chunk(2, dim=-1)[0]

    for rows, length in ((slice(None), max(lengths)), (slice(0, 1), lengths[0])):
        expected = plain(ids[rows, :length])
        for given in (ids[rows, :length], ids[rows]):
            assert (optimus.encode(given) - expected).abs().max() < 2e-6
    assert expected.abs().max() > 1


def test_decoder_ids_come_back_as_text_with_first_and_last_word():
    tokenizer = DecoderTokenizer(DECODER)
    captions = ["a red circle", "", "the star is blue and small", "Zebra, 42!"]
    ids = tokenizer(captions)
    assert ids[:, 0].eq(tokenizer.first).all()
    assert tokenizer.texts(ids) == captions
    assert tokenizer.texts(ids[:, 1:]) == captions


def test_tokenizer_without_special_tokens_is_refused():
    with pytest.raises(WeightsError, match=r"encoder_tokenizer=.*has no \[PAD\], \[CLS\], \[SEP\]"):
        EncoderTokenizer(DECODER, limit=3)


def test_too_few_positions_are_refused():
    sizes = {key: value for key, value in arguments("tiny", "text", "vae").items() if key != "_target_"}
    with pytest.raises(ValueError, match="encoder_positions=16: must be at least 32"):
        Optimus(**{**sizes, "encoder_positions": 16, "weights": None})


def test_full_size_arguments_build_the_released_layout():
    full = {key: value for key, value in arguments("versatile_diffusion", "text", "vae").items() if key != "_target_"}
    with torch.device("meta"):
        model = Optimus(**full | {"weights": None, "encoder_tokenizer": None, "decoder_tokenizer": None})
    assert sum(parameter.numel() for parameter in model.parameters()) == 241_599_744
    assert {".".join(key.split(".")[:2]) for key in model.state_dict()} == {
        *(f"encoder.{part}" for part in ("embeddings", "encoder", "pooler", "linear")),
        *(f"decoder.{part}" for part in ("transformer", "lm_head")),
    }


def test_encoding_is_deterministic_and_does_not_depend_on_the_batch(optimus):
    _, _, captions = fresh(16, 32)
    together = optimus.encode(captions)
    assert torch.equal(together, optimus.encode(captions))
    assert torch.equal(together, optimus.encode(captions, normal(together.shape)))
    alone = torch.cat([optimus.encode([caption]) for caption in captions])
    assert (together - alone).abs().max() < 1e-5


def test_captions_come_back(optimus):
    scenes, _, captions = fresh(256, 32)
    decoded = optimus.decode(optimus.encode(captions))
    assert min(caption_accuracy(decoded, scenes)) >= 0.98
    assert sum(a == b for a, b in zip(decoded, captions, strict=True)) / len(captions) >= 0.9


def generators(rows: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


@pytest.mark.parametrize("seed", [None, 3])
def test_decoding_tolerates_noise(optimus, seed):
    scenes, _, captions = fresh(256, 32)
    latents = optimus.encode(captions)
    drawn = None if seed is None else generators(256, seed)
    decoded = optimus.decode(latents + 0.3 * normal(latents.shape), drawn)
    assert min(caption_accuracy(decoded, scenes)) >= 0.93


def test_latents_have_unit_deviation_in_every_dimension(optimus):
    _, _, captions = fresh(1024, 32)
    latents = optimus.encode(captions)
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    assert latents.std(dim=0).min() > 0.7
    assert latents.std(dim=0).max() < 1.3


def test_sampling_is_reproducible_and_a_row_does_not_depend_on_the_others(optimus):
    latents = normal(torch.Size((6, 64)), seed=1)
    whole = optimus.decode(latents, generators(6, 5))
    assert whole == optimus.decode(latents, generators(6, 5))
    assert whole[2:4] == optimus.decode(latents[2:4], generators(6, 5)[2:4])
    assert whole != optimus.decode(latents, generators(6, 600), temperature=2.0)


def test_a_word_is_drawn_by_its_probability_with_a_number_of_its_own(optimus, monkeypatch):
    shares, uniform = torch.tensor([0.0, 0.2, 0.3, 0.5]), torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.999])
    assert _pick(shares.log().expand(6, -1), uniform).tolist() == [1, 1, 2, 2, 3, 3]
    # Where all words are as likely, each is the place of its own random number.
    size, tokenizer = optimus.decoder.config.vocab_size, optimus.decoder_tokenizer
    monkeypatch.setattr(optimus, "logits", lambda ids, latents, cache: torch.zeros(len(ids), 1, size))
    ids = optimus.generate(normal(torch.Size((2, 64))), tokenizer.first, tokenizer.last, generators(2, 5))
    for row, generator in zip(ids.tolist(), generators(2, 5), strict=True):
        places = (torch.rand(optimus.max_length, generator=generator) * size).long().tolist()
        drawn = row[1 : row.index(tokenizer.last)]
        assert len(drawn) > 3
        assert all(abs(word - place) <= 1 for word, place in zip(drawn, places[1:], strict=False))


def test_a_cold_sample_is_the_greedy_one(optimus):
    _, _, captions = fresh(32, 32)
    latents = optimus.encode(captions)
    assert optimus.decode(latents, generators(32, 0), temperature=1e-4) == optimus.decode(latents)


def test_bad_settings_are_named(optimus):
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        optimus.decode(normal(torch.Size((1, 64))), temperature=0)
    sizes = {key: value for key, value in arguments("tiny", "text", "vae").items() if key != "_target_"}
    bare = Optimus(**sizes | {"weights": None, "encoder_tokenizer": None, "decoder_tokenizer": None})
    with pytest.raises(ValueError, match="encoder_tokenizer=null: captions cannot be encoded"):
        bare.encode(["a red circle"])
    with pytest.raises(ValueError, match="decoder_tokenizer=null: captions cannot be decoded"):
        bare.decode(normal(torch.Size((1, 64))))


def test_ids_end_at_the_limit(optimus, monkeypatch):
    monkeypatch.setattr(optimus, "max_length", 4)
    tokenizer = optimus.decoder_tokenizer
    ids = optimus.generate(normal(torch.Size((3, 64))), tokenizer.first, tokenizer.last)
    assert ids.shape == (3, 4)
    assert ids[:, -1].eq(tokenizer.last).all()


def test_a_row_that_has_ended_is_padded(optimus, monkeypatch):
    tokenizer, size = optimus.decoder_tokenizer, optimus.decoder.config.vocab_size
    said = iter([[7, 7], [tokenizer.last, 7], [7, 7], [7, tokenizer.last]])
    monkeypatch.setattr(
        optimus, "logits", lambda *_: functional.one_hot(torch.tensor(next(said)), size)[:, None].float()
    )
    first, last = tokenizer.first, tokenizer.last
    ids = optimus.generate(normal(torch.Size((2, 64))), first, last)
    assert ids.tolist() == [[first, 7, last, last, last, last], [first, 7, 7, 7, last, last]]


def test_gradients_of_the_loss_reach_encoder_and_decoder():
    sizes = {key: value for key, value in arguments("tiny", "text", "vae").items() if key != "_target_"}
    model = Optimus(**{**sizes, "weights": None})
    loss = model.loss(["a red circle", "the star is blue"], normal(torch.Size((2, 64))), free_bits="none")
    loss.total.mean().backward()
    for name in ("encoder.linear", "decoder.transformer.linear", "decoder.transformer.linear_emb"):
        assert model.get_submodule(name).weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss.total, loss.reconstruction / torch.tensor([5.0, 6.0]) + loss.divergence)
