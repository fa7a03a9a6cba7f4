"""sudoku.py: 6 x 6 Sudoku. Every row, column and box (2 rows x 3 columns) holds the digits 1 to 6
once each; some digits are given, and exactly one way of filling in the rest is right. The fewer are
given, the harder it is.

A board is 36 digits, row by row, 0 where nothing is given. It is filled in any order, so that this
is no task for --task. Training boards whose digits are renamed stay training boards.
"""

import numpy as np

import tasks

N = 6
CELLS = N * N
ROW = np.arange(CELLS) // N  # of each cell
COLUMN = np.arange(CELLS) % N
BOX = ROW // 2 * 2 + COLUMN // 3
UNITS = [*zip(ROW.tolist(), COLUMN.tolist(), BOX.tolist(), strict=True)]
DIGITS = [1 << digit for digit in range(N)]  # a set of digits is an integer, a bit for each


def solutions(board, limit, rng=None):
    """At most `limit` ways of filling in a board; with an rng, digits are tried in random order."""
    used = [0] * N, [0] * N, [0] * N  # by row, column, box
    board = list(board)
    found = []
    for cell, digit in enumerate(board):
        if digit:
            for unit, i in zip(used, UNITS[cell], strict=True):
                unit[i] |= 1 << digit - 1
    rows, columns, boxes = used

    def search(blanks):
        # the blank with the fewest digits that fit
        fewest = N + 1
        for cell in blanks:
            row, column, box = UNITS[cell]
            taken = rows[row] | columns[column] | boxes[box]
            if N - taken.bit_count() < fewest:
                fewest, best, out = N - taken.bit_count(), cell, taken
        if not blanks:
            found.append(tuple(board))
            return
        rest = [cell for cell in blanks if cell != best]
        row, column, box = UNITS[best]
        for bit in rng.sample(DIGITS, N) if rng else DIGITS:
            if bit & out or len(found) == limit:
                continue
            board[best] = bit.bit_length()
            rows[row] |= bit
            columns[column] |= bit
            boxes[box] |= bit
            search(rest)
            rows[row] ^= bit
            columns[column] ^= bit
            boxes[box] ^= bit
        board[best] = 0

    search([cell for cell in range(CELLS) if not board[cell]])
    return found


def draw(rng, givens, held_out=False):
    """A board with so many givens and one solution -> the board, the solution.

    A tenth of all solutions is held out, by their text when the first row is named 123456.
    """
    while True:
        # 1. A full board
        (solution,) = solutions([0] * CELLS, 1, rng)
        named = "".join(str(solution.index(digit)) for digit in solution)
        if tasks.held_out(named) != held_out:
            continue
        # 2. Cells are emptied in random order; one whose digit then is in doubt stays
        board = list(solution)
        left = CELLS
        for cell in rng.sample(range(CELLS), CELLS):
            if left == givens:
                return tuple(board), solution
            board[cell] = 0
            if len(solutions(board, 2)) == 1:
                left -= 1
            else:
                board[cell] = solution[cell]
