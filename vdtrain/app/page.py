"""The page: the settings that all tabs share, and where results and errors stand."""

from __future__ import annotations

import html
import random
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from vdtrain.app.desk import Desk, StoppedError
from vdtrain.app.forms import TABS, Form, Tab, Values, paintable
from vdtrain.diffusion.sampling import SOLVERS
from vdtrain.errors import ConfigError, one_line, printable

# System fonts: others would come from another machine.
THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_border_width="1px",
    block_shadow="none",
    panel_border_width="1px",
    block_title_background_fill="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_label_background_fill="*background_fill_secondary",
    block_label_text_color="*body_text_color_subdued",
    block_label_text_color_dark="*body_text_color_subdued",
)
CSS = """
.status p {margin: 0 0 .25em; padding: .5em .75em; border-radius: 8px; overflow-wrap: anywhere;
  background: var(--background-fill-secondary);}
.status p.error {background: #fee2e2; color: #991b1b;}
.dark .status p.error {background: #450a0a; color: #fecaca;}
"""
# Of events that do not need the model.
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private"}
LARGEST_SEED = 2**31 - 1
USUAL_STEPS = 200


class Page:
    """The page of a model.

    Args:
        cache: folder of the uploads, which no line names.
    """

    def __init__(self, desk: Desk, cache: Path) -> None:
        self.desk, self.cache, self.settings = desk, cache, dict[str, Any]()

    def blocks(self) -> gr.Blocks:
        """All of it."""
        blocks = gr.Blocks(title="Versatile Diffusion", analytics_enabled=False, fill_width=True)
        with blocks:
            gr.Markdown(f"# Versatile Diffusion\n{self._about()}")
            with gr.Sidebar(width=300):
                self._settings()
            for tab in TABS:
                if outputs := self._outputs(tab):
                    with gr.Tab(tab.name, elem_id=tab.name.lower().replace(" ", "-")):
                        self._tab(tab, outputs)
            blocks.unload(self._left)
        return blocks

    def _about(self) -> str:
        config, diffuser = self.desk.config, self.desk.model.diffuser
        millions = sum(each.numel() for each in diffuser.parameters()) / 1e6
        makes, reads = (", ".join(layers) for layers in (diffuser.data_layers, diffuser.context_layers))
        path = html.escape(config.checkpoint)
        return f"{path}: {millions:,.0f} M parameters, {config.precision} on {config.device}; {reads} to {makes}"

    def _outputs(self, tab: Tab) -> list[str]:
        """The modalities that the model can make in a tab; empty if it lacks layers."""
        diffuser, found = self.desk.model.diffuser, list[str]()
        for flow in tab.flows:
            context, _, output = flow.partition("-to-")
            if context not in diffuser.context_layers or (output and output not in diffuser.data_layers):
                return []
            found += [output] if output else [each for each in ("image", "text") if each in diffuser.data_layers]
        return list(dict.fromkeys(found))

    def _settings(self) -> None:
        config, made = self.desk.config, self.settings
        gr.Markdown("### Settings")
        made["seed"] = gr.Number(config.seed, label="Seed", precision=0)
        other = gr.Button("Another seed", size="sm")
        other.click(lambda: random.randint(0, LARGEST_SEED), None, made["seed"], **AT_ONCE)
        made["count"] = gr.Slider(1, 16, value=1, step=1, label="Results")
        most = max(min(USUAL_STEPS, self.desk.model.schedule.steps), config.steps)
        made["steps"] = gr.Slider(1, most, value=config.steps, step=1, label="Steps")
        made["guidance_scale"] = gr.Slider(
            0, max(20.0, config.guidance_scale), value=config.guidance_scale, step=0.1, label="Guidance", info="1: none"
        )
        made["solver"] = gr.Radio(list(SOLVERS), value=config.solver, label="Solver")
        made["eta"] = gr.Slider(0, 1, value=config.eta, step=0.05, label="Noise (eta)", visible=config.solver == "ddim")
        made["solver"].change(
            lambda solver: gr.Slider(value=0.0, visible=solver == "ddim"), made["solver"], made["eta"], **AT_ONCE
        )
        with gr.Row():
            made["width"] = gr.Number(config.width, label="Width", precision=0, min_width=80)
            made["height"] = gr.Number(config.height, label="Height", precision=0, min_width=80)

    def _tab(self, tab: Tab, outputs: list[str]) -> None:
        gr.Markdown(tab.about)
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                form = tab.form(outputs)
                with gr.Row():
                    make = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_classes="make")
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_classes="stop")
                status = gr.HTML(elem_classes="status", padding=False)
            with gr.Column(scale=6, min_width=340):
                shown = form.outputs if form.choice is None else form.outputs[:1]
                gallery = gr.Gallery(
                    label="Images", visible="image" in shown, columns=2, height=440, object_fit="contain",
                    buttons=["download", "fullscreen"], preview=True,
                )  # fmt: skip
                captions = gr.Textbox(label="Captions", visible="text" in shown, lines=3, buttons=["copy"])
                files = gr.Files(label="Files, with their settings", visible=False)
                with gr.Accordion("The same on the command line", open=False):
                    typed = gr.Code(language="shell", show_label=False, wrap_lines=True)
        outputs_of_tab: list[Component] = [gallery, captions, files, typed, status]
        if form.choice is not None:
            form.choice.change(
                lambda output: (gr.Gallery(visible=output == "image"), gr.Textbox(visible=output == "text")),
                form.choice, [gallery, captions], **AT_ONCE,
            )  # fmt: skip
        for image, mask in form.masks:
            image.change(self._painted(mask, status), image, [mask, status], **AT_ONCE)
        # The line of an earlier attempt goes at once.
        make.click(None, None, status, js="() => ''", api_visibility="private")
        event = make.click(
            self._action(form, *outputs_of_tab), {*form.inputs, *self.settings.values()}, outputs_of_tab,
            concurrency_id="model", show_progress_on=[gallery if "image" in form.outputs else captions],
            api_visibility="private",
        )  # fmt: skip
        # What waits in the queue is taken out of it; what is being sampled ends at its next step.
        stop.click(self._stop, None, status, cancels=[event], **AT_ONCE)

    def _action(
        self, form: Form, gallery: Component, captions: Component, files: Component, typed: Component, status: Component
    ) -> Callable[..., dict[Component, Any]]:
        """What the button of a tab does."""

        def make(values: Values, request: gr.Request, progress: gr.Progress = gr.Progress()) -> dict[Component, Any]:  # noqa: B008
            def report(done: int, steps: int, part: int, parts: int) -> None:
                progress((done, steps), f"{part + 1} of {parts}: sampling" if parts > 1 else "sampling", unit="steps")

            def settings(folder: Path) -> list[dict[str, Any]]:
                shared = self._shared(values, form)
                return [shared | dict(part) for part in form.parts(values, folder)]

            try:
                result = self.desk.make(str(request.session_hash), form.command, settings, report)
            except StoppedError:
                return {status: lines("stopped")}
            except Exception as error:
                return {status: self._error(error)}
            return {
                gallery: gr.Gallery(
                    [str(file) for file in result.images], selected_index=0 if len(result.images) == 1 else None
                ),
                captions: "\n".join(result.captions),
                files: gr.Files([str(file) for file in result.files], visible=True),
                typed: "\n".join(result.commands),
                status: lines(*result.notes),
            }

        return make

    def _painted(self, mask: Component, status: Component) -> Callable[[str | None], dict[Component, Any]]:
        """Puts an image under the brush for its mask."""

        def paint(file: str | None) -> dict[Component, Any]:
            try:
                return {mask: paintable(file), status: ""}
            except Exception as error:
                return {mask: None, status: self._error(error)}

        return paint

    def _shared(self, values: Values, form: Form) -> dict[str, Any]:
        """The settings that all tabs share.

        Raises:
            ConfigError: one is empty.
        """
        given = {name: values[component] for name, component in self.settings.items()}
        for name, value in given.items():
            if value is None:
                raise ConfigError(f"{name}: empty; give a number")
        count = given.pop("count")
        return given | ({form.counted: count} if form.counted else {})

    def _error(self, error: Exception) -> str:
        """An error as one line of the page; one that is not the person's is printed too."""
        if not isinstance(error, ConfigError):
            traceback.print_exception(error, file=sys.stderr)
        uploads = re.escape(str(self.cache)) + r"/[0-9a-f]+/"
        return lines(f"error: {re.sub(uploads, '', printable(one_line(error)))}", kind="error")

    def _stop(self, request: gr.Request) -> str:
        # The button that was stopped shows nothing more.
        if self.desk.stop(str(request.session_hash)):
            return lines("stopped")
        return lines("nothing was being sampled; a request that waited is taken back")

    def _left(self, request: gr.Request) -> None:
        self.desk.stop(str(request.session_hash))


def lines(*texts: str, kind: str = "note") -> str:
    """Lines of the page."""
    return "".join(f'<p class="{kind}">{html.escape(text)}</p>' for text in texts)
