"""Slips in Gramians without rows, and in what a device or half precision asks of the engine."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

PRECISION = "tests/test_precision.py"
SITUATIONS = "tests/gradients/test_situations.py"
WITHOUT_ROWS = "tests/gradients/test_trunk_gramian.py"

GRAMIANS = (
    Mutation(
        "the scaler's factor stays in gradients without rows",
        "gradients/trunk_gramian.py",
        "outer = scaled if scale is None else scaled / scale",
        "outer = scaled",
        PRECISION,
    ),
    # Gramians without rows.
    Mutation(
        "short forms of a layer are added over ranks",
        "gradients/feature_measurement.py",
        "self._in_full or self.batch.ranks.size > 1",
        "self._in_full",
        "tests/distributed/test_gathered.py",
        "one_layer",
    ),
    Mutation(
        "a layer is measured by its short forms whatever a method says",
        "gradients/feature_measurement.py",
        'wanted == "rows" or self._in_full or',
        'wanted == "rows" or',
        SITUATIONS,
        "older",
    ),
    Mutation(
        "of a layer's parameters only those with a short form count",
        "gradients/feature_measurement.py",
        "            *rows.matrices(),\n",
        "",
        "tests/gradients/test_layer_forms.py",
    ),
    Mutation(
        "weight gradients beside rows are this rank's share alone",
        "gradients/trunk_gramian.py",
        "share = outer * self.ranks.size",
        "share = outer",
        "tests/distributed/test_gathered.py",
    ),
    Mutation(
        "each rank multiplies all columns",
        "distributed.py",
        "return tensor.tensor_split(self.size, dim=-1)[self.rank]",
        "return tensor",
        "tests/distributed/test_gathered.py",
    ),
    Mutation(
        "a bias has no part in the inner products",
        "gradients/compressed.py",
        "return a if self.bias is None else torch.cat",
        "return a if True else torch.cat",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a table's padding has a part in the inner products",
        "gradients/compressed.py",
        "counts = (index != self._padding(node))[:, None]",
        "counts = (index == index)[:, None]",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a read belongs to the bag that begins after it",
        "gradients/compressed.py",
        "places, right=True) - 1",
        "places)",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a table is judged as if its reads were factorized",
        "gradients/trunk_gramian.py",
        "if not factorizes:",
        "if False:",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a weight transposed twice counts as transposed once",
        "gradients/trunk_gramian.py",
        "transposed=transposed ^ (type(node) is TRANSPOSE)",
        "transposed=type(node) is TRANSPOSE",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a use that no rule knows is left out",
        "gradients/trunk_gramian.py",
        "kinds = {_WEIGHTS.get(key) for _, key in uses}",
        "kinds = {_WEIGHTS[key] for _, key in uses if key in _WEIGHTS} or {None}",
        WITHOUT_ROWS,
    ),
    Mutation(
        "a leaf of two tasks is differentiated once for both",
        "gradients/batched.py",
        "if sum(map(len, above)) > len(set[Tensor]().union(*above) - below):",
        "if False:",
        SITUATIONS,
        "trunk",
    ),
    Mutation(
        "of a tensor's several readers in one task the last one counts",
        "gradients/batched.py",
        "received[index] = gradient if before is None else before + gradient",
        "received[index] = gradient",
        SITUATIONS,
        "trunk",
    ),
    # Devices and half precision.
    Mutation(
        "weights are rounded to half precision",
        "gradients/rows.py",
        "return (torch.stack([rounded, rest]) @ matrix).sum(0)",
        "return rounded @ matrix",
        "tests/gradients/test_rows.py",
    ),
    Mutation(
        "features are flattened in another order than that of their memory",
        "gradients/feature_measurement.py",
        "key=lambda dim: -z.stride()[dim]",
        "key=lambda dim: dim",
        "tests/gradients/test_layout.py",
    ),
    Mutation(
        "an epoch's sums are reduced on the CPU where a rank has no label",
        "training/logging.py",
        "self._move(module.device)",
        "pass",
        "tests/devices/test_fits.py",
        "collective",
    ),
    Mutation(
        "norms are read a second time",
        "method/base.py",
        "known = signals.norms if signals.host_norms is None else signals.host_norms",
        "known = signals.norms",
        "tests/devices/test_waits.py",
    ),
)
