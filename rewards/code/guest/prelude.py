# ruff: noqa: F401, F403  (imported for the program that runs next)
"""The imports that LeetCode and HumanEval make before a solution. `ProgramReward.prelude` says which programs get them.

No name hides a builtin: `pow` is not that of `math`, for example. The function that is tested is removed from these
names, so a program has to define it.
"""

import bisect
import collections
import copy
import datetime
import functools
import heapq
import itertools
import math
import operator
import random
import re
import string
import sys
from bisect import bisect_left, bisect_right, insort, insort_left, insort_right
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import cache, cmp_to_key, lru_cache, partial, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import (
    accumulate,
    chain,
    combinations,
    count,
    cycle,
    groupby,
    islice,
    pairwise,
    permutations,
    product,
    starmap,
    takewhile,
    zip_longest,
)
from math import ceil, comb, factorial, floor, gcd, hypot, inf, isqrt, lcm, log, log2, log10, perm, pi, prod, sqrt
from operator import add, and_, itemgetter, mul, or_, xor
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import *
