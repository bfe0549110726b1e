"""A bank in an in-memory sqlite3 database: numbered transfers, each logged to a file once it is committed.

Runs until SIGTERM or for ``--transactions``; then proves that the database is whole and that no transfer was lost or
made twice, and writes ``OK …`` or ``FAIL …`` to the result file.
"""

import argparse
import itertools
import os
import random
import signal
import sqlite3
import sys

ROW_BYTES = 1000
OPENING_BALANCE = 1000


def open_bank(megabytes: int) -> tuple[sqlite3.Connection, int]:
    """A database of that size; returns it and its number of accounts."""
    accounts = megabytes * 1_000_000 // ROW_BYTES
    bank = sqlite3.connect(":memory:", isolation_level=None)
    bank.execute("PRAGMA temp_store = MEMORY")
    bank.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, note BLOB NOT NULL)")
    bank.execute("CREATE INDEX by_balance ON account (balance)")
    bank.execute("CREATE TABLE transfer (number INTEGER PRIMARY KEY, debtor INTEGER, creditor INTEGER, amount INTEGER)")
    bank.execute(
        "WITH RECURSIVE ids(id) AS (VALUES (1) UNION ALL SELECT id + 1 FROM ids WHERE id < ?)"
        " INSERT INTO account SELECT id, ?, randomblob(?) FROM ids",
        (accounts, OPENING_BALANCE, ROW_BYTES - 50),
    )
    return bank, accounts


def transfer(bank: sqlite3.Connection, number: int, accounts: int, choose: random.Random) -> str | None:
    """Make transfer ``number``; returns its line for the log, or None when it was rolled back."""
    debtor, creditor = choose.sample(range(1, accounts + 1), 2)
    amount = choose.randrange(1, 100)
    bank.execute("BEGIN IMMEDIATE")
    move = "UPDATE account SET balance = balance + ?, note = randomblob(?) WHERE id = ?"
    bank.execute(move, (-amount, ROW_BYTES - choose.randrange(40, 60), debtor))
    bank.execute(move, (amount, ROW_BYTES - choose.randrange(40, 60), creditor))
    bank.execute("INSERT INTO transfer VALUES (?, ?, ?, ?)", (number, debtor, creditor, amount))
    if choose.random() < 0.1:
        bank.execute("ROLLBACK")
        return None
    bank.execute("COMMIT")
    return f"{number} {debtor} {creditor} {amount}\n"


def problems(bank: sqlite3.Connection, accounts: int, committed: int, log_path: str) -> list[str]:
    """What is wrong with the database, by itself and against the log."""
    found = [f"integrity_check: {line}" for (line,) in bank.execute("PRAGMA integrity_check") if line != "ok"]
    made = list(bank.execute("SELECT number, debtor, creditor, amount FROM transfer ORDER BY number"))
    with open(log_path) as log:
        logged = [tuple(map(int, line.split())) for line in log]
    if [row[0] for row in made] != list(range(1, committed + 1)):
        found.append(f"{committed} transfers were committed; the table holds {len(made)}, not the numbers 1 to that")
    if logged != made:
        first = next(i for i, pair in enumerate(itertools.zip_longest(logged, made)) if pair[0] != pair[1])
        found.append(f"log ({len(logged)} lines) and table ({len(made)} rows) differ from row {first} on")
    balances = dict.fromkeys(range(1, accounts + 1), OPENING_BALANCE)
    for _, debtor, creditor, amount in made:
        balances[debtor] -= amount
        balances[creditor] += amount
    actual = dict(bank.execute("SELECT id, balance FROM account"))
    if actual != balances:
        wrong = [account for account in balances if actual.get(account) != balances[account]]
        found.append(f"{len(wrong)} balances are not what the transfers make them, first of account {wrong[:1]}")
    return found


def main() -> int:
    """Fill the bank, transfer until told to stop, verify."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--transactions", type=int)
    options = parser.parse_args()

    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    log_fd = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    bank, accounts = open_bank(options.megabytes)
    choose = random.Random(1)
    committed = 0
    while not stopped and committed != options.transactions:
        line = transfer(bank, committed + 1, accounts, choose)
        if line:
            committed += 1
            os.write(log_fd, line.encode())

    found = problems(bank, accounts, committed, options.log)
    with open(options.result, "w") as result:
        result.write(f"{'FAIL' if found else 'OK'} transactions={committed} accounts={accounts}\n")
        result.writelines(f"{problem}\n" for problem in found[:50])
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
