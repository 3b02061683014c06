"""A page on which to try a fine-tuned model on images.

    python -m demo.app --adapter blip2-finetuned-demo             # http://127.0.0.1:7860
    python -m demo.app --adapter blip2-finetuned --space space    # writes a folder for Hugging Face Spaces instead

It needs gradio (requirements-app.txt). gradio stores an upload as bytes, up to --max-upload-mb; it is decoded by
captioner.data.image_decoding alone: JPEG and PNG, up to 50 million pixels.
"""

import csv
import html
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from captioner.data.image_decoding import open_image
from captioner.runtime.errors import UserError

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("????????-????????.jpg"))
MAX_IMAGES = 200  # of one batch
STYLE = """
.caption, .failed { font-size: 1.05rem; line-height: 2; margin-top: 1.4rem; }
.said { --colour: color-mix(in srgb, #2f7fb8 var(--sure), #d9722e); padding: 0.1em 0.3em; border-radius: 4px;
  border-bottom: 3px solid var(--colour); background: color-mix(in srgb, var(--colour) 16%, transparent); }
.said small { opacity: 0.75; font-variant-numeric: tabular-nums; }
.failed { border-left: 4px solid #d9722e; padding: 0.4em 0.8em; }
"""


@dataclass(frozen=True)
class AppConfig:
    """Serve a page on which to try a fine-tuned model, or write it as a folder for Hugging Face Spaces."""

    adapter: Path = Path("blip2-finetuned-demo")  # folder that main.py wrote
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine's, so that others reach the page
    port: int = 7860  # port to listen on
    max_upload_mb: int = 20  # MB of one uploaded file
    seed: int = 42  # of sampling
    space: Path | None = None  # write this folder for Hugging Face Spaces, and serve nothing


class Page:
    """What the page does with what is entered: plain functions of paths and numbers, to HTML and tables."""

    def __init__(self, caption):
        self.caption = caption  # what load_captioner gave

    def try_image(self, path: str | None, how: str, temperature: float, seed: float | None) -> tuple:
        """(image, HTML after fine-tuning, HTML before) of one file; an error in place of the first HTML."""
        if path is None:
            return None, "", ""
        options = self.choose_tokens(how, temperature, seed)
        try:
            image = open_image(Path(path))
            after, before = (self.caption.describe(path, finetuned=tuned, **options) for tuned in (True, False))
        except UserError as error:
            return None, show_error(error, path), ""
        return image, show_description(after), show_description(before)

    def choose_tokens(self, how: str, temperature: float, seed: float | None) -> dict:
        """Options of a caption; an empty field stands for the seed 0."""
        self.caption.seed = int(seed or 0)
        return {"greedy": how == "greedy", "temperature": temperature}

    def try_folder(self, paths: list[str] | None, how: str, temperature: float, seed: float | None) -> tuple:
        """(HTML, rows of name, caption and least certainty, CSV file) of many files; what can't be read is listed."""
        readable, failed = [], []
        for path in (paths or [])[:MAX_IMAGES]:
            try:
                open_image(Path(path), draft=True)
                readable.append(path)
            except UserError as error:
                failed.append(show_error(error, path))
        if len(paths or []) > MAX_IMAGES:
            failed.append(show_error(UserError(f"{len(paths)} files: the first {MAX_IMAGES} are taken"), ""))
        described = self.caption.describe(readable, **self.choose_tokens(how, temperature, seed)) if readable else []
        rows = [
            [Path(path).name, what.text, f"{min([part.certainty for part in what.sentences], default=0):.2f}"]
            for path, what in zip(readable, described, strict=True)
        ]
        return f"<p>{len(rows)} captions</p>" + "".join(failed), rows, write_table(rows) if rows else None


def show_description(description) -> str:
    """The sentences of a caption as HTML, each coloured by its certainty: orange at 0.5 and less, blue at 1."""
    parts = [
        f'<span class="said" style="--sure: {max(0, 200 * part.certainty - 100):.0f}%">{html.escape(part.text)} '
        f"<small>{part.certainty:.2f}</small></span>"
        for part in description.sentences
    ]
    return f'<p class="caption">{" ".join(parts) or "<i>nothing</i>"}</p>'


def show_error(error: UserError, path: str) -> str:
    """The error as HTML, with the name of the upload in place of where gradio put it."""
    text = str(error).replace(path, Path(path).name) if path else str(error)
    return f'<p class="failed" role="alert">{html.escape(text)}</p>'


def write_table(rows: list[list[str]]) -> str:
    path = Path(tempfile.mkdtemp(prefix="captions-")) / "captions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["name", "prediction", "least_certainty"], *rows])
    return str(path)


def make_page(page: Page, title: str, upload_mb: int):
    """The page as gradio's Blocks; of a larger upload than `upload_mb` MiB gradio itself says no more than Error."""
    import gradio as gr

    def pick_example(event: gr.SelectData) -> str:
        return str(EXAMPLES[event.index])

    alone = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}  # one call at a time
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nEach sentence is coloured by the mean probability of its tokens: blue is certain.")
        with gr.Row():
            how = gr.Radio(["greedy", "sampled"], value="greedy", label="decoding")
            temperature = gr.Slider(0.1, 1.5, value=0.7, step=0.1, label="temperature (sampled)")
            seed = gr.Number(page.caption.seed, precision=0, label="seed (sampled)")
        with gr.Tab("One image"):
            file = gr.File(
                label=f"drop or pick an image, JPEG or PNG of at most {upload_mb} MB",
                file_count="single",
                elem_id="upload",
            )
            examples = gr.Gallery(
                list(map(str, EXAMPLES)),
                label="or one of these, which no training has seen",
                columns=len(EXAMPLES),
                height=190,
                allow_preview=False,
                interactive=False,
                elem_id="examples",
            )
            examples.select(pick_example, None, file, api_visibility="private")
            image = gr.Image(label="image", interactive=False, height=360, format="jpeg", buttons=["fullscreen"])
            with gr.Row():
                with gr.Column(min_width=320):
                    after = gr.HTML(label="after fine-tuning", show_label=True, container=True, elem_id="after")
                with gr.Column(min_width=320):
                    before = gr.HTML(label="before fine-tuning", show_label=True, container=True, elem_id="before")
            inputs, outputs = [file, how, temperature, seed], [image, after, before]
            for changed in (file, how, temperature, seed):
                changed.change(page.try_image, inputs, outputs, **alone)
        with gr.Tab("A folder"):
            files = gr.File(label=f"a folder, up to {MAX_IMAGES} images", file_count="directory", elem_id="folder")
            told = gr.HTML(elem_id="told")
            table = gr.Dataframe(headers=["name", "caption", "least certainty"], interactive=False, wrap=True)
            download = gr.File(label="captions.csv", interactive=False)
            files.change(page.try_folder, [files, how, temperature, seed], [told, table, download], **alone)
    return blocks


def serve(config: AppConfig, blocking: bool = True):
    """Load the model and serve the page; returns gradio's Blocks, to be closed, unless `blocking`."""
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs gradio: pip install -r requirements-app.txt") from None
    from captioner.blip2.captioning import load_captioner

    page = Page(load_captioner(config.adapter, seed=config.seed))
    blocks = make_page(page, f"Driving scenes: {config.adapter.name}", config.max_upload_mb)
    blocks.launch(
        server_name=config.host,
        server_port=config.port,
        max_file_size=config.max_upload_mb * 2**20,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=not blocking,
        footer_links=[],
        allowed_paths=[str(EXAMPLES[0].parent)],  # else gradio serves what lies below the current folder alone
        css=STYLE,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    return blocks


def main(config: AppConfig) -> None:
    if config.space is not None:
        from demo.space import write_space

        write_space(config.adapter, config.space)
        print(f"{config.space}: push it to a Space of your own, see its README.md")
    else:
        serve(config)


if __name__ == "__main__":
    from captioner.runtime.cli import run_script, start_imports

    config = tyro.cli(AppConfig)
    start_imports()
    run_script(main, config)
