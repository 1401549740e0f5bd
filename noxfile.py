# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tests with the oldest and the newest libraries that the package claims: `pip install nox && nox`."""

import nox

OLDEST = {"peft": "0.21.0", "transformers": "5.23.0"}


@nox.session
@nox.parametrize("versions", ["oldest", "newest"])
def tests(session: nox.Session, versions: str) -> None:
    """`constraints.txt` pins the newest that were tested; of PEFT and transformers the oldest are put in place."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    if versions == "oldest":
        session.install(*(f"{name}=={version}" for name, version in OLDEST.items()))
    session.run("python", "-m", "pytest", *session.posargs)
