"""An environment of your own: a question about a small database, which the agent may query before it answers.

python examples/sql_environment.py      plays one episode with the right queries

To train on it, start from this folder (docs/environments.md explains the settings):

cd examples && python -m atod_fast.train --preset own --run-dir runs/sql env.name=sql_environment:SqlQuestions \\
    env.train='{seed=0}' env.eval='{seed=1}' env.max_turns=6 rollout.history=6 rollout.response_tokens=96 \\
    student.path=Qwen/Qwen3-0.6B teacher.path=Qwen/Qwen3-4B
"""

import sqlite3
from random import Random

from atod_fast.envs.prompt import PlainPrompt
from atod_fast.errors import UserError

TABLE = "orders(customer TEXT, item TEXT, month INTEGER, amount INTEGER)"
CUSTOMERS, ITEMS = ("Ana", "Ben", "Cleo", "Dai"), ("tea", "rice", "lamp", "pen", "rug")
QUESTIONS = {  # task type: (question, query that answers it)
    "count": (
        "How many orders did {c} place in month {m}?",
        "SELECT COUNT(*) FROM orders WHERE customer='{c}' AND month={m}",
    ),
    "sum": (
        "What is the total amount that {c} spent on {i}?",
        "SELECT TOTAL(amount) FROM orders WHERE customer='{c}' AND item='{i}'",
    ),
    "most": (
        "On which item did {c} spend most? (Of equal ones the first in the alphabet.)",
        "SELECT item FROM orders WHERE customer='{c}' GROUP BY item ORDER BY SUM(amount) DESC, item LIMIT 1",
    ),
}
INSTRUCTIONS = f"""You answer a question about a SQLite database with one table, {TABLE}.
An action is either one SELECT statement, whose rows you are shown, or ANSWER followed by the answer."""
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
ROWS, CHARACTERS = 10, 400  # the most of a query's result that is shown
WORK = 200_000  # virtual-machine steps of SQLite that a query may take: a few milliseconds


class SqlQuestions:
    """Ask a question about a small database; `seed` and the task number draw both. Reward 1 for the right answer."""

    instant = True

    def __init__(self, *, tasks: int = 1000, seed: int = 0, orders: int = 60):
        if orders < 1:
            raise UserError(f"orders={orders} leaves an empty table; use 1 or more")
        self.tasks, self.seed, self.orders = tasks, seed, orders
        self.database = None

    def __len__(self):
        return self.tasks

    def reset(self, seed, task):
        draw = Random(f"{self.seed} {task}")
        self.close()
        self.database = sqlite3.connect(":memory:")
        self.database.execute(f"CREATE TABLE {TABLE}")
        rows = [
            (draw.choice(CUSTOMERS), draw.choice(ITEMS), draw.randint(1, 12), draw.randint(1, 99))
            for _ in range(self.orders)
        ]
        self.database.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", rows)
        self.task, self.kind = task, draw.choice(list(QUESTIONS))
        facts = {"c": draw.choice(rows)[0], "i": draw.choice(ITEMS), "m": draw.randint(1, 12)}
        question, self.query = (text.format(**facts) for text in QUESTIONS[self.kind])
        self.right = self.database.execute(self.query).fetchone()[0]
        # A model writes the query: it may only read this table, within limits of time and size.
        self.database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
        self.database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        return question, self.info()

    def step(self, action):
        word, _, rest = action.strip().partition(" ")
        if word.upper().rstrip(":") == "ANSWER":
            won = self.is_right(rest.strip().rstrip("."))
            return ("Right." if won else "Wrong."), float(won), True, False, self.info(won=won)
        budget = iter(range(WORK // 1000))
        self.database.set_progress_handler(lambda: next(budget, None) is None, 1000)
        try:
            rows = self.database.execute(action).fetchmany(ROWS)
        except (sqlite3.Error, sqlite3.Warning) as error:
            return f"Error: {error}"[:CHARACTERS], 0.0, False, False, self.info(valid=False)
        shown = "\n".join(" | ".join(map(str, row)) for row in rows) or "No rows."
        return shown[:CHARACTERS], 0.0, False, False, self.info()

    def is_right(self, answer):
        try:
            return float(answer) == self.right
        except ValueError:
            return answer.lower() == self.right

    def info(self, valid=True, won=False):
        return {"won": won, "is_action_valid": valid, "task_id": f"{self.seed}/{self.task}", "task_type": self.kind}

    def clone(self):
        return SqlQuestions(tasks=self.tasks, seed=self.seed, orders=self.orders)

    def close(self):
        if self.database is not None:
            self.database.close()
            self.database = None

    def prompt(self, thinking, history):
        return PlainPrompt(thinking, history, INSTRUCTIONS)


def main() -> None:
    env = SqlQuestions()
    observation, _ = env.reset(seed=0, task=0)
    print(observation)
    for action in ("SELECT * FROM orders LIMIT 3", "DROP TABLE orders", env.query, f"ANSWER {env.right}"):
        observation, reward, over, _, _ = env.step(action)
        print(f"> {action}\n{observation}")
    print(f"reward {reward}, over: {over}")
    env.close()


if __name__ == "__main__":
    main()
