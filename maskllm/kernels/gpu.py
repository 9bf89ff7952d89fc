def why_not() -> str | None:
    return "no"


def using() -> str:
    return ""


def linear() -> None:
    pass
