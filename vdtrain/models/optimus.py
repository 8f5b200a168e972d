"""Captions to one latent vector and back: Optimus, the text VAE of Versatile Diffusion, frozen in training.

Li et al. 2020, "Optimus: Organizing Sentences via Pre-trained Modeling of a Latent Space": a BERT encoder and a GPT-2
decoder. The latent enters the decoder in both ways of section 3.1: added to every token embedding, and as one more
position that every layer attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel

from vdtrain.models.frozen_weights import device_and_dtype, load_weights
from vdtrain.models.tokenizers import DecoderTokenizer, EncoderTokenizer

FreeBits = Literal["none", "mask", "deterministic"]


@dataclass(frozen=True)
class TextLoss:
    """Loss of the text VAE in nats, each [B]: total = reconstruction / tokens + beta * divergence."""

    total: Tensor
    reconstruction: Tensor
    divergence: Tensor


class Optimus(nn.Module):
    """BERT encoder and GPT-2 decoder around a latent vector, with the key names of the released weights.

    Args:
        latent_size: length of the latent vector.
        encoder_width, encoder_layers, encoder_heads, encoder_feed_forward, encoder_positions, encoder_vocabulary:
            size of the BERT encoder.
        decoder_width, decoder_layers, decoder_heads, decoder_positions, decoder_vocabulary: size of the GPT-2 decoder.
        encoder_tokenizer: `tokenizers` JSON file of the encoder; None limits the model to ids.
        decoder_tokenizer: the same for the decoder.
        max_word_pieces: word pieces of a caption that are encoded; the rest is cut.
        max_length: length in ids of a decoded caption, <BOS> and <EOS> included.
        weights: safetensors file with the released key names; None leaves random weights.
    """

    def __init__(
        self,
        latent_size: int,
        encoder_width: int,
        encoder_layers: int,
        encoder_heads: int,
        encoder_feed_forward: int,
        encoder_positions: int,
        encoder_vocabulary: int,
        decoder_width: int,
        decoder_layers: int,
        decoder_heads: int,
        decoder_positions: int,
        decoder_vocabulary: int,
        encoder_tokenizer: str | None = None,
        decoder_tokenizer: str | None = None,
        max_word_pieces: int = 77,
        max_length: int = 30,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        # Token positions start at 1, after the latent's. The last id, <EOS>, is never an input.
        for name, positions, needed in (
            ("encoder_positions", encoder_positions, max_word_pieces + 2),
            ("decoder_positions", decoder_positions, max_length),
        ):
            if positions < needed:
                raise ValueError(f"{name}={positions}: must be at least {needed}, for the longest caption")
        self.latent_size = latent_size
        self.max_length = max_length
        self.encoder_tokenizer = EncoderTokenizer(encoder_tokenizer, max_word_pieces) if encoder_tokenizer else None
        self.decoder_tokenizer = DecoderTokenizer(decoder_tokenizer) if decoder_tokenizer else None
        self.encoder = BertModel(
            BertConfig(
                vocab_size=encoder_vocabulary,
                hidden_size=encoder_width,
                num_hidden_layers=encoder_layers,
                num_attention_heads=encoder_heads,
                intermediate_size=encoder_feed_forward,
                max_position_embeddings=encoder_positions,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.decoder = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=decoder_vocabulary,
                n_embd=decoder_width,
                n_layer=decoder_layers,
                n_head=decoder_heads,
                n_positions=decoder_positions,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        # The released weights' names put these three inside the modules of transformers.
        self.encoder.add_module("linear", nn.Linear(encoder_width, 2 * latent_size, bias=False))
        transformer = self.decoder.transformer
        transformer.add_module("linear", nn.Linear(latent_size, decoder_width * decoder_layers, bias=False))
        transformer.add_module("linear_emb", nn.Linear(latent_size, decoder_width, bias=False))
        self._heads, self._layers = decoder_heads, decoder_layers
        if weights is not None:
            load_weights(self, weights, "vae.weights")

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one latent, [latent size]; it does not depend on the image's size."""
        return (self.latent_size,)

    def prepare(self, captions: Sequence[str]) -> Tensor:
        """Encoder ids int64 [B, L] of captions; see `EncoderTokenizer`.

        Raises:
            ValueError: the model has no encoder tokenizer.
        """
        if self.encoder_tokenizer is None:
            raise ValueError("vae.encoder_tokenizer=null: captions cannot be encoded; give a tokenizer.json")
        return self.encoder_tokenizer(captions)

    def encode(self, captions: Sequence[str] | Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean [B, latent size] of captions, or of ids from `prepare`, in the dtype of the parameters.

        Versatile Diffusion trains on the mean. `noise` is unused; it belongs to the interface that all VAEs share.
        """
        return self._posterior_of(captions)[0]

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers, for compilation."""
        return list(self.encoder.encoder.layer)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, generators: Sequence[torch.Generator] | None = None, temperature: float = 1.0
    ) -> list[str]:
        """Decode one caption per latent.

        Args:
            latents: [B, latent size].
            generators: one for each row, so that a row's random words do not depend on the others; None takes the
                likeliest word each time.
            temperature: a value below 1 favours likely words; it has no effect without generators.

        Raises:
            ValueError: the temperature is not above 0, or the model has no decoder tokenizer.
        """
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0; for the likeliest words, omit generators")
        tokenizer = self._decoder_tokenizer()
        ids = self.generate(latents, tokenizer.first, tokenizer.last, generators, temperature)
        return tokenizer.texts(ids)

    def posterior(self, ids: Tensor, pad: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, latent size], of encoder ids int64 [B, L]."""
        # In this form the mask is used as it is. Of a mask [B, L] transformers first asks whether it hides anything,
        # which would wait for the device.
        mask = (ids != pad)[:, None, None].expand(-1, -1, ids.shape[1], -1)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).pooler_output
        mean, log_variance = self.encoder.get_submodule("linear")(hidden).chunk(2, dim=-1)
        return mean, log_variance

    def logits(self, ids: Tensor, latents: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Scores [B, L, vocabulary] of the id that follows each id.

        Args:
            ids: int64 [B, L]; they follow the ids in `cache`.
            latents: [B, latent size].
            cache: keys and values of the earlier ids, from `memory`; extended in place. None starts a new one.
        """
        cache = self.memory(latents) if cache is None else cache
        transformer = self.decoder.transformer
        embeddings = transformer.wte(ids) + transformer.get_submodule("linear_emb")(latents)[:, None]
        hidden = transformer(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state
        scores: Tensor = self.decoder.lm_head(hidden)
        return scores

    def memory(self, latents: Tensor) -> DynamicCache:
        """A cache with the latent as key and value of position 0 in every layer; token positions start at 1."""
        projected = self.decoder.transformer.get_submodule("linear")(latents)
        cache = DynamicCache()
        for layer, part in enumerate(projected.chunk(self._layers, dim=-1)):
            heads = part.view(len(latents), self._heads, 1, -1)
            cache.update(heads, heads, layer)
        return cache

    @torch.no_grad()
    def generate(
        self,
        latents: Tensor,
        first: int,
        last: int,
        generators: Sequence[torch.Generator] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Ids int64 [B, at most max_length] from `first` to `last`; `last` also pads rows that ended earlier.

        Without generators, each id is the likeliest one.
        """
        device, dtype = device_and_dtype(self)
        latents = latents.to(device, dtype)
        cache = self.memory(latents)
        uniform = None
        if generators is not None:
            rows = [torch.rand(self.max_length, generator=each, device=each.device) for each in generators]
            uniform = torch.stack(rows)
        ids = torch.full((len(latents), 1), first, dtype=torch.int64, device=device)
        ended = torch.zeros(len(latents), dtype=torch.bool, device=device)
        while ids.shape[1] < self.max_length - 1 and not bool(ended.all()):
            scores = self.logits(ids[:, -1:], latents, cache)[:, -1].float()
            if uniform is None:
                chosen = scores.argmax(dim=-1)
            else:
                chosen = _pick(scores / temperature, uniform[:, ids.shape[1]].to(device))
            chosen = chosen.masked_fill(ended, last)
            ended = ended | (chosen == last)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
        return torch.cat([ids, torch.full_like(ids[:, :1], last)], dim=1)

    def reconstruction(self, ids: Tensor, latents: Tensor, pad: int) -> Tensor:
        """Cross-entropy [B] in nats of decoder ids int64 [B, L] after the first, summed over each row except `pad`."""
        scores = self.logits(ids[:, :-1], latents)
        losses = functional.cross_entropy(scores.transpose(1, 2), ids[:, 1:], ignore_index=pad, reduction="none")
        return losses.sum(dim=1)

    def loss(
        self,
        captions: Sequence[str],
        noise: Tensor,
        beta: float = 1.0,
        free_bits: FreeBits = "mask",
        target_divergence: float = 0.0,
    ) -> TextLoss:
        """The text VAE's training loss (Li et al. 2020, section 3.2).

        Args:
            captions: B texts to reconstruct.
            noise: standard normal [B, latent size].
            beta: weight of the divergence from the standard normal.
            free_bits: "none"; "mask" omits dimensions whose divergence is at most `target_divergence` nats;
                "deterministic" sets the posterior's variance to 1.
            target_divergence: per dimension, in nats.
        """
        tokenizer = self._decoder_tokenizer()
        ids = tokenizer(captions).to(noise.device)
        mean, log_variance = self._posterior_of(captions)
        return self.loss_of(mean, log_variance, ids, tokenizer.pad, noise, beta, free_bits, target_divergence)

    def loss_of(
        self,
        mean: Tensor,
        log_variance: Tensor,
        ids: Tensor,
        pad: int,
        noise: Tensor,
        beta: float = 1.0,
        free_bits: FreeBits = "mask",
        target_divergence: float = 0.0,
    ) -> TextLoss:
        """`loss` for the `posterior`, each part [B, latent size], and decoder ids int64 [B, L] padded by `pad`."""
        if free_bits == "deterministic":
            log_variance = torch.zeros_like(log_variance)
        divergences = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)
        if free_bits == "mask":
            divergences = divergences * (divergences > target_divergence)
        divergence = divergences.sum(dim=-1)
        latents = mean + (0.5 * log_variance).exp() * noise
        reconstruction = self.reconstruction(ids, latents, pad)
        tokens = (ids != pad).sum(dim=1)
        return TextLoss(reconstruction / tokens + beta * divergence, reconstruction, divergence)

    def _decoder_tokenizer(self) -> DecoderTokenizer:
        if self.decoder_tokenizer is None:
            raise ValueError("vae.decoder_tokenizer=null: captions cannot be decoded; give a tokenizer.json")
        return self.decoder_tokenizer

    def _posterior_of(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        ids = captions if isinstance(captions, Tensor) else self.prepare(captions)
        device, _ = device_and_dtype(self)
        pad = 0 if self.encoder_tokenizer is None else self.encoder_tokenizer.pad
        return self.posterior(ids.to(device), pad)


def _pick(scores: Tensor, uniform: Tensor) -> Tensor:
    """One id [B] per row of scores [B, vocabulary]: the inverse of its cumulative distribution at uniform [B]."""
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    # Rounding can leave the last sum below 1. Scaling by it keeps every draw inside the vocabulary.
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.squeeze(1).clamp_max(scores.shape[-1] - 1)
