"""Take the pictures of this documentation: TensorBoard and the page of `nm compare` in a browser.

    python docs/take_pictures.py runs/study_short_wd_on runs/study_short_lr_correction …

It needs Chromium, and writes to docs/pictures. TensorBoard is asked for the tabs of the dashboards.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parent / "pictures"
PORT = 6543
READING_TIME = 30  # s; TensorBoard does not say when it has read all of a run
BROWSER = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
COLOURS = 256  # that are kept of a picture
SIZES = {
    "custom_scalars": (1300, 1400),
    "images": (1300, 900),
    "histograms": (1300, 900),
    "compare": (1400, 1500),
}


def main() -> None:
    """Write one picture for each of SIZES."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="+")
    runs = parser.parse_args().run
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "comparison.html"
        nm("compare", *runs, "--report", str(page))
        take("compare", page.as_uri())
    command = [sys.executable, "-m", "nmlightning", "dashboard", *runs, "--port", str(PORT)]
    dashboard = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://localhost:{PORT}/data/plugin/scalars/tags")
        time.sleep(READING_TIME)
        for tab in ("custom_scalars", "images", "histograms"):
            take(tab, f"http://localhost:{PORT}/#{tab}")
    finally:
        dashboard.terminate()


def nm(*words: str) -> None:
    """Run one command."""
    subprocess.run([sys.executable, "-m", "nmlightning", *words], check=True)


def take(name: str, address: str) -> None:
    """Write the picture of a page, once its scripts have had time."""
    width, height = SIZES[name]
    file = PICTURES / f"{name}.png"
    size, shot = f"--window-size={width},{height}", f"--screenshot={file}"
    command = [*BROWSER, size, shot, "--virtual-time-budget=30000", address]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with Image.open(file) as picture:
        picture.quantize(COLOURS).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size:,} bytes")


def wait_for(address: str, seconds: float = 60) -> None:
    """Return once TensorBoard has read something, or raise TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address) as answer:
                if len(answer.read()) > len(b"{}"):
                    return
        except OSError:
            pass
        time.sleep(1)
    raise TimeoutError(f"TensorBoard shows nothing at {address} after {seconds:g} s.")


if __name__ == "__main__":
    main()
