import pytest

from nmlightning.reports.formatting import MeanStd, format_mean_std, format_value


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.9307, "val/top1", "93.07 %"),
        (0.27134, "val/loss", "0.2713"),
        (-0.5, "val/loss", "-0.5000"),
        (27.314, "val/bleu", "27.31"),
        (5.1, "val/ppl", "5.1000"),
        (0.0, "val/bleu", "0.00"),
        (12345.678, "train/tokens_per_s", "12,346"),
        (float("nan"), "val/loss", "nan"),
    ],
)
def test_format_value_has_the_decimals_of_its_size(value: float, metric: str, text: str) -> None:
    assert format_value(value, metric) == text


def test_format_mean_std_has_the_unit_once() -> None:
    assert format_mean_std(MeanStd.of([0.93, 0.92, 0.94]), "val/top1") == "93.00 ± 1.00 %"
