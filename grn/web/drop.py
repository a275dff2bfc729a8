"""Where pictures are dropped on the page."""

from collections.abc import Awaitable, Callable

from nicegui import events, ui
from nicegui.run import io_bound
from PIL import Image

from grn.runtime.errors import UserError
from grn.web.uploads import MAX_BYTES, picture

# Instead of a list of uploads with their sizes (page.css), of which each is shown elsewhere at once.
HEADER = """
<q-btn flat no-caps stack class="full-width q-py-md" icon="add_photo_alternate" label="{label}">
  <q-uploader-add-trigger />
</q-btn>
"""


def drop_picture(
    label: str,
    on_picture: Callable[[Image.Image], Awaitable[None]],
    on_problem: Callable[[str], object],
    *,
    testid: str,
) -> ui.upload:
    """A place to drop a picture, or to choose one.

    Args:
        label: what stands there.
        on_picture: takes it, RGB or RGBA, upright.
        on_problem: takes a line on a file that cannot be used, and "" when another one is.
        testid: of the element, for tests.
    """

    async def take(event: events.UploadEventArguments) -> None:
        try:
            if event.file.size() > MAX_BYTES:  # before it is read into memory
                raise UserError(f"{event.file.name[:60]} has more than {MAX_BYTES // 2**20} MiB")
            decoded = await io_bound(picture, event.file.name, await event.file.read())
        except UserError as mistake:
            on_problem(str(mistake))
            return
        on_problem("")
        if decoded is not None:  # the studio is being closed
            await on_picture(decoded)

    upload = ui.upload(auto_upload=True, max_file_size=MAX_BYTES, on_upload=take)
    upload.on("uploaded", upload.reset)  # not before: that would break the answer off
    upload.on_rejected(lambda: on_problem(f"that is no picture of at most {MAX_BYTES // 2**20} MiB"))
    upload.props(f'accept="image/*" flat bordered data-testid="{testid}"').classes("studio-upload studio-drop w-full")
    upload.add_slot("header", HEADER.format(label=label))
    return upload
