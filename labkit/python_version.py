"""The Python versions that the workbook was tried on; an older Python can read this file."""

OLDEST, NEWEST = (3, 11), (3, 13)
"""`requires-python` in pyproject.toml admits both."""


def advice() -> str:
    """Return what to do on a Python that the workbook was not tried on."""
    tried = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    newest = "{}.{}".format(*NEWEST)
    return (
        f"The workbook was tried on Python {tried}. Get one of these from python.org, from your "
        f"system's packages, or with `conda create -n workbook python={newest}`, and make the "
        f"environment with it: python{newest} -m venv .venv (Windows: py -{newest} -m venv .venv)"
    )
