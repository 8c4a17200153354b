"""Share of right answers, for `evaluate.load` by path; "accuracy" on the Hub is the same."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of the predictions, in [0, 1], that equal their references."


class Accuracy(evaluate.Metric):
    """`compute(predictions=[1, 0], references=[1, 1])` gives `{"accuracy": 0.5}`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}
