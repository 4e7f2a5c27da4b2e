"""The diagrams of docs/concepts.md. Each function draws one; `pictures.py` writes them to docs/diagrams/."""

from collections.abc import Callable

from svg import Canvas


def packed() -> str:
    """Three pictures of different shapes, padded and packed."""
    canvas = Canvas(
        860, 372, "Three samples of 6, 12 and 8 image tokens: padded to one length, and packed in one row"
    )
    samples = [("2 x 3", 6, "green"), ("3 x 4", 12, "blue"), ("2 x 4", 8, "orange")]
    longest, cell = 12, 27
    canvas.text(0, 18, "Padded: (B, longest, C) and a mask", bold=True)
    for row, (grid, count, colour) in enumerate(samples):
        y = 34 + row * 34
        canvas.text(0, y + 18, f"sample {row}, {grid} tokens", size=12)
        for i in range(longest):
            if i < count:
                canvas.box(150 + i * cell, y, cell - 3, 24, colour, round=3)
            else:
                canvas.box(150 + i * cell, y, cell - 3, 24, "grey", dashed=True, round=3)
    canvas.text(496, 52, "dashed: padding, which is stored,", size=12, colour="soft")
    canvas.text(496, 69, "computed and masked away again", size=12, colour="soft")

    canvas.text(0, 168, "Packed: (T, C), T = 6 + 12 + 8", bold=True)
    place = 0
    for count, colour in ((count, colour) for _, count, colour in samples):
        for _ in range(count):
            canvas.box(20 + place * cell, 184, cell - 3, 24, colour, round=3)
            place += 1
    for bound in (0, 6, 18, 26):
        x = 20 + bound * cell - 1.5
        canvas.line((x, 180), (x, 218), colour="ink")
        canvas.text(x, 233, str(bound), size=12, anchor="middle", mono=True)
    canvas.text(740, 201, "image tokens", size=12, colour="soft")
    canvas.text(740, 233, "cu_seqlens", size=12, mono=True)

    place = 0
    bounds = [0]
    for count, colour in ((5, "green"), (9, "blue"), (3, "orange")):
        for _ in range(count):
            canvas.box(20 + place * cell, 258, cell - 3, 24, colour, round=3)
            place += 1
        bounds.append(place)
    for bound in bounds:
        x = 20 + bound * cell - 1.5
        canvas.line((x, 254), (x, 292), colour="ink")
        canvas.text(x, 307, str(bound), size=12, anchor="middle", mono=True)
    canvas.text(496, 275, "text rows (S, E), captions as long as they are", size=12, colour="soft")
    canvas.text(496, 307, "cu_seqlens_text", size=12, mono=True)
    canvas.text(
        0,
        345,
        "Attention: image queries of sample b over keys of sample b, image and text. No mask exists.",
        size=12.5,
    )
    canvas.text(
        0,
        363,
        "Where each token lies in its picture (RoPE) is an index of its own, so any shapes share a batch.",
        size=12.5,
    )
    return canvas.svg()


def step() -> str:
    """One training step, from the sample's number to the log."""
    canvas = Canvas(860, 452, "One training step: sample, frozen networks, noise, denoiser, loss, update")
    canvas.text(0, 16, "for every micro-batch", size=12, colour="soft")
    canvas.label(
        0, 26, 170, 64, "SampleStream", "pictures, crops, captions", "host threads, ahead", colour="orange"
    )
    canvas.label(
        230, 26, 190, 64, "Preparation", "text encoder, autoencoder,", "teacher: frozen", colour="purple"
    )
    canvas.label(480, 26, 170, 64, "FlowMatching", "t, noise,", "x_t = (1 - t) x + t n", colour="blue")
    canvas.label(710, 26, 150, 64, "RoutingPolicy", "rows that run,", "or none", colour="blue")
    canvas.line((170, 58), (229, 58), arrow=True)
    canvas.text(200, 50, "Batch", size=11, anchor="middle", colour="soft")
    canvas.line((420, 58), (479, 58), arrow=True)
    canvas.text(450, 50, "(T, P)", size=11, anchor="middle", colour="soft")
    canvas.line((650, 58), (709, 58), arrow=True)
    canvas.line((785, 90), (785, 127), arrow=True)

    canvas.box(100, 128, 760, 116, "green")
    canvas.text(118, 150, "TrainingModel", bold=True)
    canvas.text(232, 150, "the denoiser, BF16 products over FP32 weights", size=12, colour="soft")
    blocks = [
        ("in", 700),
        ("0", 640),
        ("1", 590),
        ("2", 530),
        ("3", 480),
        ("...", 430),
        ("12", 380),
        ("13", 320),
    ]
    for name, x in [*blocks, ("14", 270), ("15", 220), ("out", 150)]:
        routed = name in ("2", "3", "...", "12")
        h = 34 if routed else 62
        wide = 56 if name in ("in", "out") else 38
        canvas.box(x, 164 + (62 - h), wide, h, "blue" if routed else "green", solid=False)
        canvas.text(x + wide / 2, 164 + 62 - h / 2 + 4.5, name, size=12, anchor="middle")
    canvas.curve("M579 186 C560 164 398 164 369 186", "orange", 2)
    canvas.text(474, 187, "bypass", size=11, anchor="middle", colour="orange")
    canvas.line((699, 195), (679, 195), arrow=True)
    canvas.line((219, 195), (207, 195), arrow=True)

    canvas.line((150, 195), (60, 195), (60, 279), arrow=True)
    canvas.text(52, 184, "prediction", size=11, colour="soft", anchor="middle")
    canvas.label(
        0, 280, 190, 58, "Losses", "flow, perceptual, alignment:", "one number a sample", colour="blue"
    )
    canvas.line((190, 309), (249, 309), arrow=True)
    canvas.label(250, 280, 150, 58, "backward", "FP32 gradients", "accumulate", colour="green")

    canvas.text(0, 374, "once a step", size=12, colour="soft")
    canvas.line((400, 309), (430, 309), (430, 359), (95, 359), (95, 383), arrow=True)
    canvas.label(0, 384, 190, 58, "reduce", "between the processes,", "ZeRO 0 to 3", colour="orange")
    canvas.label(230, 384, 150, 58, "finite? clip", "the one place where", "the host waits", colour="purple")
    canvas.label(420, 384, 180, 58, "AdamW or Muon", "on FP32 masters", "unless not finite", colour="green")
    canvas.label(640, 384, 90, 58, "EMA", "FP32", colour="green")
    canvas.label(770, 384, 90, 58, "log", "log.jsonl", colour="grey")
    for x, end in ((190, 229), (380, 419), (600, 639), (730, 769)):
        canvas.line((x, 413), (end, 413), arrow=True)
    return canvas.svg()


def routing() -> str:
    """Dense, TREAD and SPRINT: how many tokens run through which block."""
    canvas = Canvas(860, 430, "How many tokens run through each of 16 blocks: dense, TREAD, SPRINT")
    rows = [
        ("Dense", "all tokens, all blocks", 0.0, ""),
        ("TREAD", "half bypass blocks 2 to 12", 0.5, "put back where they lay"),
        ("SPRINT", "three quarters bypass", 0.75, "fused in a layer"),
    ]
    left, wide, tall = 170, 36, 64
    for i, (name, words, drop, back) in enumerate(rows):
        y = 40 + i * 128
        canvas.text(0, y + 28, name, bold=True, size=15)
        canvas.text(0, y + 46, words, size=12, colour="soft")
        x = left
        for block in range(16):
            routed = drop > 0 and 2 <= block <= 12
            h = tall * (1 - drop) if routed else tall
            if block == 13 and name == "SPRINT":
                canvas.box(x, y, 26, tall, "purple")
                canvas.curve(f"M{x + 13} {y + tall} v8", "purple")
                canvas.text(
                    x + 13, y + tall + 21, "Linear(all, deep)", size=11, anchor="middle", colour="purple"
                )
                x += 33
            canvas.box(x, y + tall - h, wide - 5, h, "blue" if routed else "green", round=3)
            canvas.text(
                x + (wide - 5) / 2,
                y + tall - h / 2 + 4,
                str(block),
                size=10.5,
                anchor="middle",
                colour="soft",
            )
            x += wide
        if drop:
            first, last = left + 2 * wide - 3, left + 13 * wide - 3
            top = y + 6 + tall * drop * 0.25
            canvas.line(
                (first, top + 4),
                (first + 12, top),
                (last - 14, top),
                (last, top + 4),
                colour="orange",
                width=2.5,
            )
            canvas.text(
                (first + last) / 2,
                top - 6,
                f"bypass: {drop:.0%} of the tokens, {back}",
                size=11.5,
                anchor="middle",
                colour="orange",
            )
    canvas.text(
        0,
        404,
        "Routing is for training; in sampling all tokens run, unless the guidance says otherwise.",
        size=12.5,
    )
    canvas.text(
        0,
        422,
        'Which tokens bypass is drawn from (seed, sample, "route"): an index into the packed rows.',
        size=12.5,
    )
    return canvas.svg()


def data() -> str:
    """From a folder of files to the tokens of a step."""
    canvas = Canvas(
        860,
        436,
        "The way of a sample: prepared into shards once, then read, decoded, cropped, encoded, packed",
    )
    canvas.text(0, 16, "Once", bold=True)
    canvas.label(
        0, 28, 170, 70, "pictures, captions", "a folder, WebDataset tars,", "Parquet files", colour="grey"
    )
    canvas.line((170, 63), (229, 63), arrow=True)
    canvas.label(
        230, 28, 170, 70, "prepare.py", "decode everything once,", "sort into buckets", colour="orange"
    )
    canvas.line((400, 63), (459, 63), arrow=True)
    canvas.label(
        460, 28, 190, 70, "shards", "tar + index, CRC-32 a sample,", "SHA-256 a file", colour="green"
    )
    canvas.line((315, 98), (315, 121), arrow=True)
    canvas.label(230, 122, 170, 36, "rejects.jsonl", colour="grey")
    canvas.text(412, 145, "every refused input, with its reason", size=11.5, colour="soft")
    canvas.line((650, 63), (689, 63), arrow=True)
    canvas.label(
        690, 28, 170, 70, "prepare.py --cache", "text rows, posteriors,", "beside the shards", colour="purple"
    )

    canvas.text(0, 196, "Every sample of every step", bold=True)
    canvas.label(
        0, 210, 150, 78, "order", "(seed, epoch) and", "(seed, sample): no", "state to save", colour="blue"
    )
    canvas.line((150, 249), (189, 249), arrow=True)
    canvas.label(
        190, 210, 150, 78, "read", "one read of its bytes,", "CRC compared", "any thread", colour="green"
    )
    canvas.line((340, 249), (379, 249), arrow=True)
    canvas.label(
        380, 210, 150, 78, "decode, crop", "DALI or Pillow,", "the same bits", "on a CPU", colour="orange"
    )
    canvas.line((530, 249), (569, 249), arrow=True)
    canvas.label(570, 210, 130, 78, "pinned bytes", "uint8 until they", "are on the device", colour="grey")
    canvas.line((700, 249), (729, 249), arrow=True)
    canvas.label(730, 210, 130, 78, "device", "FP32 in [-1, 1]", colour="green")
    canvas.text(0, 312, "threads, data.prefetch micro-batches ahead", size=11.5, colour="soft")
    canvas.line((795, 288), (795, 339), arrow=True)

    canvas.label(
        570,
        340,
        290,
        64,
        "frozen networks",
        "text encoder, autoencoder, teacher,",
        "on a stream beside the step",
        colour="purple",
    )
    canvas.label(230, 340, 230, 64, "caches", "mapped files, instead of", "the networks", colour="purple")
    canvas.line((570, 372), (530, 372), (530, 424), (180, 424), (180, 390), (151, 390), arrow=True)
    canvas.line((230, 360), (151, 360), arrow=True)
    canvas.label(0, 340, 150, 64, "packed tokens", "(T, P), (S, E),", "Layout", colour="blue")
    return canvas.svg()


def zero() -> str:
    """What each of four processes stores at each ZeRO stage."""
    canvas = Canvas(
        860, 404, "FP32 master weights, and what each of four processes stores at ZeRO stage 0 to 3"
    )
    canvas.text(0, 16, "Arithmetic and storage", bold=True)
    canvas.label(0, 28, 150, 56, "master weights", "FP32", colour="green")
    canvas.label(236, 28, 150, 56, "forward, backward", "BF16 products", colour="blue")
    canvas.label(472, 28, 150, 56, "gradients", "FP32", colour="orange")
    canvas.label(708, 28, 152, 56, "AdamW, EMA", "FP32 moments", colour="purple")
    canvas.line((150, 56), (235, 56), arrow=True)
    canvas.text(193, 48, "autocast", size=11, anchor="middle", colour="soft")
    canvas.line((386, 56), (471, 56), arrow=True)
    canvas.line((622, 56), (707, 56), arrow=True)
    canvas.text(665, 48, "reduce, clip", size=11, anchor="middle", colour="soft")
    canvas.line((784, 84), (784, 104), (75, 104), (75, 85), arrow=True)
    canvas.text(
        430,
        120,
        "the update changes the masters: an update smaller than BF16's last digit is not lost",
        size=11.5,
        anchor="middle",
        colour="soft",
    )

    canvas.text(0, 160, "Of every tensor, each of four processes holds", bold=True)
    rows = [
        ("weights in forward", "green", (4, 4, 4, 1)),
        ("gradients", "orange", (4, 4, 1, 1)),
        ("masters", "green", (0, 1, 1, 0)),
        ("moments", "purple", (4, 1, 1, 1)),
        ("EMA", "purple", (4, 1, 1, 1)),
    ]
    for stage in range(4):
        canvas.text(240 + stage * 165, 186, f"ZeRO {stage}", size=12.5, anchor="middle", bold=True)
    for i, (name, colour, shares) in enumerate(rows):
        y = 196 + i * 33
        canvas.text(0, y + 17, name, size=12.5)
        for stage, share in enumerate(shares):
            x = 180 + stage * 165
            if share == 0:
                canvas.text(x + 60, y + 17, "are the weights", size=11.5, anchor="middle", colour="soft")
                continue
            for part in range(4):
                held = part < share
                canvas.box(x + part * 30, y, 27, 24, colour if held else "grey", dashed=not held, round=3)
    canvas.text(
        0,
        384,
        "Dashed: on the other processes. Checkpoints store ranges of elements, so a run resumes at any stage",
        size=12.5,
    )
    canvas.text(0, 401, "and on any number of processes.", size=12.5)
    return canvas.svg()


DIAGRAMS: dict[str, Callable[[], str]] = {
    "packed": packed,
    "step": step,
    "routing": routing,
    "data": data,
    "zero": zero,
}
