"""What bracket_counting.py has found, as Markdown."""

from typing import Any

from bracket_prompts import SHORT

_LAWS = ("all heads", "sparse", "the head alone", "layers before", "the pruned circuit", "even average", "no dilution")
_HEADS = 5
_AGREEMENT = ("correlation", "slope", "explained", "same_sign", "gap_correlation")
_FLIPS = ("flip [", "flip [[")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def markdown(name: str, found: dict[str, Any]) -> str:
    """Everything of one run."""
    parts = []
    for label in ("sparse", "dense"):
        if label in found:
            roles, figures = found[label]["roles"], found[label]["figures"]
            parts += [
                f"\n## {name}, {label} model: {roles['pairs_right']:.2f} of the selection pairs right",
                heads_table(roles),
            ]
            if "inner" in roles:
                parts += [roles_table(roles)]
            parts += [numbers_table(figures), laws_table(figures)]
    if "steering" in found:
        parts += [
            f"\n## {name}, dense model steered, {found['steering']['names']} names and {SHORT}",
            steering_table(found["steering"]),
        ]
    return "\n\n".join(parts)


def heads_table(roles: dict[str, Any]) -> str:
    rows = [
        [head, digits(of["share"]), digits(of["first"]), digits(of["rest"]), digits(of["even"]), digits(of["uneven"])]
        for head, of in list(roles["heads"].items())[:_HEADS]
    ]
    shown = table(
        ["head", "share that moves", "looks at opener", "at each other token", "1/n", "off even average"], rows
    )
    if "parts" in roles:
        parts = ", ".join(f"{part} {digits(share)}" for part, share in roles["parts"].items())
        head, random = ".".join(map(str, roles["head"])), digits(roles["random"])
        shown += f"\n\nhead {head}: by part {parts}; as many random channels at most {random}"
    return shown


def roles_table(roles: dict[str, Any]) -> str:
    columns = ("[", "[[", "list", "before", "last")
    rows = []
    for role, nodes in (
        ("detector", roles["detectors"]),
        ("in the head", roles["inner"]),
        ("threshold", roles.get("neurons", [])),
    ):
        rows += [
            [role, _node(of), digits(of["share"]), *(digits(of["values"][column]) for column in columns)]
            for of in nodes
        ]
    for of in roles["written"][:3]:
        rows.append(
            ["depth" if of == roles["depth"] else "written", _node(of), digits(of["share"]), *[""] * len(columns)]
        )
    shown = table(["role", "node", "share", "at `[`", "at `[[`", "in the list", "before it", "last token"], rows)
    if "depth" in roles:
        by_depth = ", ".join(f"{depth}: {digits(value)}" for depth, value in roles["by_depth"].items())
        through = ", ".join(f"{place} {digits(share)}" for place, share in roles["through"].items())
        weight = digits(roles["logit_weight"])
        shown += f"\n\ndepth channel by open brackets: {by_depth}; share through {through}"
        shown += f"; weight to `]]` over `]` {weight}"
    return shown


def numbers_table(figures: dict[str, Any]) -> str:
    """Measured and foretold margins by number of names, evaluation prompts."""
    measured = figures["measured"]["evaluation"]
    law = figures["laws"]["all heads"]["mean"]
    head, rows = (
        ["names", "margin after `[`", "after `[[`", "foretold", "foretold", "pairs right", "looks at opener", "1/n"],
        [],
    )
    if "depth" in measured:
        head += ["depth `[`", "`[[`", "foretold", "foretold"]
    for index, number in enumerate(figures["numbers"]):
        row = [number, *map(digits, [*measured["margins"][index], *law[index]]), digits(figures["right"][index])]
        row += [digits(measured["looks"][index][0]), digits(measured["looks"][index][3])]
        if "depth" in measured:
            row += map(digits, [*measured["depth"][index], *figures["laws"]["depth, all heads"]["mean"][index]])
        rows.append(row)
    return table(head, rows)


def laws_table(figures: dict[str, Any]) -> str:
    """How well each law foretells margins, and the depth channel, on evaluation prompts."""
    laws = figures["laws"]
    rows = [_agreement(law, laws[law]) for law in _LAWS if law in laws]
    if figures["other heads"]:
        of = figures["other heads"]
        rows.append(_agreement(f"best other head alone ({of['best'].split()[1]})", of))
    rows.append(["measured", *[""] * len(_AGREEMENT), *(digits(figures["flips"][flip]) for flip in _FLIPS)])
    rows += [_agreement(f"depth channel: {law}", laws[f"depth, {law}"]) for law in _LAWS if f"depth, {law}" in laws]
    mean, largest = digits(figures["other orders"]["mean"]), digits(figures["other orders"]["largest"])
    head = ["law", *(name.replace("_", " ") for name in _AGREEMENT), "flip after `[`", "after `[[`"]
    return (
        f"{table(head, rows)}\n\nall heads, numbers in another order: correlation {mean} on average, at most {largest}"
    )


def _agreement(law: str, of: dict[str, Any]) -> list[str]:
    return [
        law,
        *(digits(of[name]) for name in _AGREEMENT),
        *(digits(of[flip]) if flip in of else "" for flip in _FLIPS),
    ]


def steering_table(steering: dict[str, Any]) -> str:
    long, rows = steering["names"], []
    for names in (long, SHORT):
        rows.append(["-", f"unsteered, {names} names", "", *map(digits, steering["unsteered"][str(names)]), "", "", ""])
    for move, arms in steering["moves"].items():
        for arm, of in arms.items():
            for what in ("repair", "cause"):
                one, four = (of[what][strength] for strength in ("1", "4"))
                spread = f"{digits(one['least'])} to {digits(one['most'])}" if one["least"] != one["most"] else ""
                rows.append(
                    [
                        move,
                        f"{what}: {arm}",
                        digits(of["norm"]),
                        *map(digits, one["margins"]),
                        spread,
                        *map(digits, four["margins"]),
                    ]
                )
    head = [
        "amount",
        "arm",
        "norm",
        "margin after `[`",
        "after `[[`",
        "draws",
        "after `[`, four times as far",
        "after `[[`",
    ]
    return table(head, rows)


def seeds_table(results: dict[str, Any]) -> str:
    """The failure by model, evaluation prompts: where it sets in and what foretells it."""
    rows = []
    for name, found in results.items():
        for label in ("sparse", "dense"):
            if label in found:
                figures, roles = found[label]["figures"], found[label]["roles"]
                law, flips, right = figures["laws"]["all heads"], figures["flips"], figures["right"]
                row = [f"{name}, {label}", digits(right[figures["numbers"].index(SHORT)]), digits(right[-1])]
                for flip in _FLIPS:
                    row += [digits(flips[flip]), digits(law[flip])]
                row += [digits(law[figure]) for figure in ("correlation", "explained", "gap_correlation")]
                head, of = next(iter(roles["heads"].items()))
                rows.append([*row, head, digits(of["share"]), digits(of["first"]), digits(of["even"])])
    head = ["model", "pairs right, 3 names", "most names", "flip after `[`", "foretold", "flip after `[[`", "foretold"]
    head += ["correlation", "explained", "gap correlation", "head", "its share", "looks at opener", "1/n"]
    return "\n" + table(head, rows)


def digits(value: Any) -> str:
    if value is None:
        return "never"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _node(of: dict[str, Any]) -> str:
    return f"{of['place'].removeprefix('blocks.').replace('hook_', '')}.{of['channel']}"
