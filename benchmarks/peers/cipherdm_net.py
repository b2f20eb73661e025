"""CipherDM's MNIST U-Net in JAX, exact or with its approximations; the parameters are those of mnist01.safetensors.

Source: CipherDM (arXiv 2409.05414) and its authors' code. Not theirs: the weights, which predict v, and upsampling by
repetition and a convolution instead of a transposed one. As a script it draws the image of `cipherdm_spu.py` in float,
without SPU, and counts the denominators of the softmax that are negative:

    python cipherdm_net.py mnist01.safetensors >> OUT.jsonl
"""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np

GROUPS = {
    "softmax": ("softmax",),
    "silu": ("silu",),
    "norm": ("norm",),
    "linear": ("conv", "dense", "matmul"),
}
_CHEXP = (0.14021878, 0.27541278, 0.22122865, 0.14934221, 0.0907736, 0.04369614, 0.02087868, 0.00996535)
_ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
TIMES = np.arange(1, 1000, 20)[::-1]  # 981, 961, ..., 1


def chexp(x):
    """exp on [-14, 0] as CipherDM writes it: a Chebyshev series of degree 7, in powers."""
    v = x / 7 + 1
    p = [1, v]
    for _ in range(6):
        p.append(p[-1] * v)
    terms = (
        1, p[1], 2 * p[2] - 1, 4 * p[3] - 3 * p[1], 8 * p[4] - 8 * p[2] + 1, 16 * p[5] - 20 * p[3] + 5 * p[1],
        32 * p[6] - 48 * p[4] + 18 * p[2] - 1, 64 * p[7] - 112 * p[5] + 56 * p[3] - 7 * p[1],
    )  # fmt: skip
    return sum(c * term for c, term in zip(_CHEXP, terms, strict=True))


class Ops:
    """The network's operators, channels last; ``replaced`` names those in CipherDM's approximation."""

    def __init__(self, replaced=()):
        self.replaced = replaced

    def conv(self, x, w, b, stride=1):
        pad = [(w.shape[0] // 2,) * 2] * 2
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), pad, dimension_numbers=names) + b

    def dense(self, x, w, b):
        return x @ w + b

    def matmul(self, a, b):
        return jnp.matmul(a, b)

    def norm(self, x, gain, bias, groups=2):
        """Group normalisation as Flax computes it: E[x^2] - E[x]^2, not below zero."""
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, groups, c // groups)
        mean, square = (part.mean((1, 2, 4), keepdims=True) for part in (x, x * x))
        scale = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + 1e-5)
        return ((x - mean) * (scale * gain.reshape(groups, -1)) + bias.reshape(groups, -1)).reshape(
            b, h, w, c
        )

    def silu(self, x):
        if "silu" not in self.replaced:
            return jax.nn.silu(x)
        below, left, above = x < -6.0, x < -2.0, x > 6.0
        x2 = jnp.square(x)
        x4 = jnp.square(x2)
        outer = -0.01420163 * x2 - 0.16910363 * x - 0.52212664
        inner = 0.00008032 * (x2 * x4) - 0.00602401 * x4 + 0.19784596 * x2 + 0.49379432 * x + 0.03453821
        return above * x + (below ^ left) * outer + (left ^ above ^ True) * inner

    def softmax(self, x):
        if "softmax" not in self.replaced:
            return jax.nn.softmax(x, -1)
        x = x - x.max(-1, keepdims=True)
        e = chexp(x) * (x > -14)
        return e / self.denominator(e)

    def denominator(self, e):
        return e.sum(-1, keepdims=True)


class Recorder(Ops):
    """Keeps what each operator was called with; its functions are the exact ones, or ``replaced``."""

    def __init__(self, replaced=()):
        super().__init__(replaced)
        self.calls = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in sum(GROUPS.values(), ()):
            return found

        def call(*args, **more):
            self.calls.append((name, [np.asarray(a, np.float32) for a in args], more))
            return found(*args, **more)

        return call


def read_weights(path):
    """A safetensors file as float32 arrays: convolutions (H, W, in, out), dense (in, out)."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    kinds, found = {"F16": np.float16, "F32": np.float32}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        flat = np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        value = flat.reshape(entry["shape"]).astype(np.float32)
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        found[name] = np.ascontiguousarray(value)
    embeddings = found.pop("embeddings")  # (classes, 1, 76): what each block adds, side by side
    count = sum(v.size for v in found.values()) + embeddings.size
    if count != 15_881:
        raise SystemExit(f"{path} holds {count} parameters; name the weights of CipherDM's network, 15881")
    return found, embeddings[:, 0]


def sinusoids(t):
    """(1, 4) sines, then cosines, of one time."""
    angles = t * np.array([1.0, 1e-4])
    return np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)


def unet(ops, p, x, wave, label):
    """Prediction (B, 28, 28, 1) for x, with the sinusoids (1, 4) of the time and a class (B, 76)."""

    def conv(name, x, stride=1):
        return ops.conv(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=stride)

    def dense(name, x):
        return ops.dense(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name, x):
        return ops.norm(x, p[f"{name}.weight"], p[f"{name}.bias"])

    used = 0

    def block(name, x):
        nonlocal used
        h = conv(f"{name}.widen", ops.silu(norm(f"{name}.first", x)))
        width = h.shape[-1]
        added = dense(f"{name}.time", ops.silu(emb)) + label[:, used : used + width]
        used += width
        h = conv(f"{name}.refine", ops.silu(norm(f"{name}.second", h + added[:, None, None, :])))
        return h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in p else x)

    def attention(name, x):
        b, h, w, c = x.shape
        n = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", n).reshape(b, h * w, c) for part in "qkv")
        mixed = ops.softmax(ops.matmul(q, k.transpose(0, 2, 1)) * c**-0.5)
        return x + conv(f"{name}.out", ops.matmul(mixed, v).reshape(b, h, w, c))

    emb = dense("embed_again", ops.silu(dense("embed", wave)))
    x = conv("enter", x)
    kept = [x]
    for i in range(4):
        x = block(f"down.{i}.0", x)
        if i > 1:
            x = attention(f"down.{i}.1", x)
        kept.append(x)
        if i == 1:
            x = conv("shrink.0", x, 2)
            kept.append(x)
    x = block("middle.2", attention("middle.1", block("middle.0", x)))
    for i in range(6):
        x = block(f"up.{i}.0", jnp.concatenate([x, kept.pop()], -1))
        if i < 3:
            x = attention(f"up.{i}.1", x)
        if i == 2:
            x = conv("grow.0", jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
    return conv("leave", ops.silu(norm("norm", x)))


def schedule(t):
    """(4,): sqrt(abar), sqrt(1 - abar) of a time, then of the time 20 earlier (0 at the end)."""
    now, then = _ABAR[t], _ABAR[max(t - 20, 0)]
    return np.sqrt([now, 1 - now, then, 1 - then]).astype(np.float32)


def ddim(ops, p, x, wave, label, s):
    """One DDIM step with eta 0, x0 clipped to [-1, 1]. The weights predict v, a public combination of x0 and noise."""
    v = unet(ops, p, x, wave, label)
    return s[2] * jnp.clip(s[0] * x - s[1] * v, -1.0, 1.0) + s[3] * (s[1] * x + s[0] * v)


def images(ops, p, noise, label):
    """DDIM-50 in float."""
    step, x = jax.jit(lambda *given: ddim(ops, *given)), noise
    for t in TIMES:
        x = step(p, x, sinusoids(t), label, schedule(t))
    return np.asarray(x)


class Counter(Ops):
    """Keeps the denominators of CipherDM's softmax."""

    def __init__(self, replaced):
        super().__init__(replaced)
        self.seen = []

    def denominator(self, e):
        found = super().denominator(e)
        self.seen.append(np.asarray(found).ravel())
        return found


def main(path):
    """One line for each of CipherDM's settings: the image in float, digit 0, the first noise of seed 0."""
    weights, embeddings = read_weights(path)
    noise = np.random.default_rng(0).standard_normal((1, 28, 28, 1)).astype(np.float32)
    exact = images(Ops(), weights, noise, embeddings[:1])
    for setting, replaced in (("softmax", ("softmax",)), ("silu", ("silu",)), ("both", ("softmax", "silu"))):
        ops, x = Counter(replaced), noise
        for t in TIMES:
            x = ddim(ops, weights, x, sinusoids(t), embeddings[:1], schedule(t))
        seen, gap = np.concatenate([*ops.seen, np.ones(0)]), np.asarray(x) - exact
        record = {
            "peer": "jax", "config": "float32", "setting": setting, "case": "cipherdm_ddim50",
            "max_abs_err": float(f"{np.abs(gap).max():.4g}"),
            "rel_l2_err": float(f"{np.linalg.norm(gap) / np.linalg.norm(exact):.4g}"),
        }  # fmt: skip
        if seen.size:
            record |= {
                "denominators": seen.size, "negative": int((seen < 0).sum()), "least": round(float(seen.min()), 3),
                "nearest_to_0": float(f"{np.abs(seen).min():.2g}"),
            }  # fmt: skip
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
