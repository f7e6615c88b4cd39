"""Frames as an MP4 file (H.264), with PyAV."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfdask.errors import StorageError

FRAMES_PER_SECOND = 16
_QUALITY = "18"  # x264's constant rate factor: no loss that people see


def check_available() -> None:
    """Raises StorageError without PyAV."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise StorageError("MP4 files need PyAV, which is not here; pip install 'dfdask[video]'") from None


def mp4(frames: NDArray[np.uint8], frames_per_second: int) -> bytes:
    """(frame, y, x, channel) uint8, RGB, as the bytes of a file. Raises StorageError for other channels."""
    import av

    count, height, width, channels = frames.shape
    if channels != 3:
        raise StorageError(f"videos with {channels} channels cannot be exported; read them with run.dataset()")
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=frames_per_second, options={"crf": _QUALITY})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"  # halved colours need even sides
        stream.thread_count = 1
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
