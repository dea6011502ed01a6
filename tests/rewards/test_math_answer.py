"""The math reward as tables: what a model may write, the gold answer, and the score."""

import json
import pickle
import random
import subprocess
import sys
import threading
import time

import pytest
from latex2sympy2_extended.antlr_parser import PSParser

from grpo_ext.rewards import MathAnswerReward, check_gold, math_answer_reward
from grpo_ext.rewards.math import expression
from grpo_ext.rewards.math.answer import MAX_CHARACTERS
from grpo_ext.rewards.math.expression import parse_expression
from grpo_ext.rewards.math.final_answer import extract_final_answer
from tests.tools.paths import TINY_DATA
from tests.tools.waiting import PATIENCE

RIGHT, WRONG, UNSCORED = 1.0, 0.0, None

TIMEOUT = 10.0  # default time limit of a worker, in seconds per completion
CASES = [
    # LOCATION OF THE FINAL ANSWER
    # \boxed: the last complete one, with nested braces
    (r"so it is \boxed{42}", "42", RIGHT),
    (r"\boxed{41}, no: \boxed{42}", "42", RIGHT),
    (r"\boxed{42}, no: \boxed{41}", "42", WRONG),
    (r"\boxed{\frac{1}{\frac{2}{1}}}", r"\frac{1}{\frac{2}{1}}", RIGHT),
    (r"\boxed{\left\{1, 2\right\}}", r"\{1,2\}", RIGHT),
    (r"\boxed {42}", "42", RIGHT),
    (r"\boxed{{42}}", "42", RIGHT),
    (r"$$\boxed{42}$$", "42", RIGHT),
    (r"\boxed{42} and then \boxed{4", "42", RIGHT),  # the last one was cut off
    (r"\boxed{x = \boxed{42}}", "42", RIGHT),
    # <answer>
    ("<answer>42</answer>", "42", RIGHT),
    ("<answer>\n42\n</answer>", "42", RIGHT),
    ("<ANSWER>42</ANSWER>", "42", RIGHT),
    ("<answer>41</answer> <answer>42</answer>", "42", RIGHT),
    ("<answer>42</answer> <answer>4", "42", RIGHT),
    ("<answer><answer>42</answer></answer>", "42", RIGHT),
    ("</answer>42<answer>", "42", WRONG),
    # ####
    ("8+8+0=16 #### 1016", "1016", RIGHT),
    ("8+8+0=16 #### 1013", "1016", WRONG),
    ("#### 1\n#### 2", "2", RIGHT),
    ("#### 42\nThat was easy.", "42", RIGHT),
    ("##### 42", "42", RIGHT),
    ("### 42", "42", WRONG),
    # sentences
    ("The answer is 42.", "42", RIGHT),
    ("The final answer is: 3.14. I am sure.", "3.14", RIGHT),
    ("The answer is: $\\frac{1}{2}$.", "0.5", RIGHT),
    ("The answer is:\n\n$$42$$", "42", RIGHT),
    ("The answer is **42**.", "42", RIGHT),
    ("the answer is \\(42\\)!", "42", RIGHT),
    ("Answer: 42", "42", RIGHT),
    ("**Final Answer:** 42", "42", RIGHT),
    ("The answer is 41. Wait, the answer is 42.", "42", RIGHT),
    ("答案是 42。", "42", RIGHT),
    ("答案为：42", "42", RIGHT),
    ("答案：42。因为", "42", RIGHT),
    ("所以答案是１０１６。", "1016", RIGHT),
    # the whole text, if it is nothing but a number
    ("42", "42", RIGHT),
    (" -7.50 ", "-7.5", RIGHT),
    ("42 apples", "42", RIGHT),
    # the order of markers
    (r"#### 1, but \boxed{2}", "2", RIGHT),
    (r"\boxed{2} and #### 1", "2", RIGHT),
    ("#### 1 <answer>2</answer>", "2", RIGHT),
    ("The answer is 1. #### 2", "2", RIGHT),
    # text before </think> is ignored
    (r"<think>maybe \boxed{41}</think> The answer is 42.", "42", RIGHT),
    (r"<think>\boxed{42}</think> I do not know.", "42", WRONG),
    # no final answer
    ("I think 42 or so", "42", WRONG),
    ("", "42", WRONG),
    (" \n", "42", WRONG),
    ("####", "42", WRONG),
    (r"\boxed{}", "42", WRONG),
    (r"\boxed", "42", WRONG),
    (r"\boxed{42", "42", WRONG),
    ("The answer is", "42", WRONG),
    ("x = 42", "42", WRONG),
    #
    # NUMBERS
    # signs, zeros and points
    ("#### +42", "42", RIGHT),
    ("#### \u221242", "-42", RIGHT),
    ("#### –42", "-42", RIGHT),
    ("#### - 42", "-42", RIGHT),
    ("#### --42", "42", WRONG),
    ("#### -42", "42", WRONG),
    ("#### 42.", "42", RIGHT),
    ("#### 042", "42", RIGHT),
    ("#### 42.00", "42", RIGHT),
    ("#### .5", "0.5", RIGHT),
    ("#### 0", "-0", RIGHT),
    ("#### ٤٢", "42", RIGHT),  # digits of other scripts are digits
    ("#### 1.2.3", "1.2", WRONG),
    # thousands: a comma and three digits; a point is a decimal point
    ("#### 1,016", "1016", RIGHT),
    ("#### 1016", "1,016", RIGHT),
    ("#### 1,000,000", "1000000", RIGHT),
    ("#### 1 000 000", "1000000", RIGHT),
    ("#### 1\u202f016", "1016", RIGHT),
    (r"\boxed{1{,}016}", "1016", RIGHT),
    (r"\boxed{1\,016}", "1016", RIGHT),
    (r"\boxed{10,\!000}", "10000", RIGHT),
    ("#### 1,01", "101", WRONG),
    ("#### 1.016", "1,016", WRONG),
    ("#### 1,5", "1.5", WRONG),  # a decimal comma: two candidates
    ("#### 1,0000", "10000", WRONG),
    # decimals are exact, not rounded and not in floating point
    ("#### 0.1", "1/10", RIGHT),
    ("#### 0.30000000000000004", "0.3", WRONG),
    ("#### 0.333", "1/3", WRONG),
    ("#### 1/3", "0.333", WRONG),
    ("#### 3.14", "3.14159", WRONG),
    (r"\boxed{0.\overline{3}}", r"\frac{1}{3}", RIGHT),
    (r"\boxed{0.1\overline{6}}", "1/6", RIGHT),
    ("#### 0.333...", "1/3", WRONG),
    # fractions
    (r"\boxed{\frac{1}{2}}", "0.5", RIGHT),
    (r"\boxed{\dfrac{1}{2}}", "1/2", RIGHT),
    (r"\boxed{\tfrac12}", r"\frac{1}{2}", RIGHT),
    (r"\boxed{\frac1{2}}", r"\frac12", RIGHT),
    (r"\boxed{\frac{3}{4}}", r"\frac{6}{8}", RIGHT),
    ("#### 6/8", "3/4", RIGHT),
    (r"\boxed{-\frac{1}{2}}", "-1/2", RIGHT),
    (r"\boxed{\frac{-1}{2}}", "-1/2", RIGHT),
    ("#### ½", "0.5", RIGHT),
    ("#### 1⁄2", "0.5", RIGHT),
    ("#### 2/1", "2", RIGHT),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}", WRONG),
    ("#### 1/0", "0", WRONG),
    (r"\boxed{\frac{0}{0}}", "0", WRONG),
    # mixed numbers
    (r"\boxed{3\frac{1}{2}}", "3.5", RIGHT),
    (r"\boxed{3 \tfrac12}", "7/2", RIGHT),
    ("#### 3 1/2", "3.5", RIGHT),
    ("#### 3½", "3.5", RIGHT),
    ("#### -3 1/2", "-3.5", RIGHT),
    ("#### 3 1/2", "1.5", WRONG),  # not a product
    ("#### 5 6", "11", WRONG),  # not a sum
    # percentages: 50% is a half, and also the 50 of "how many percent?"
    (r"\boxed{50\%}", "0.5", RIGHT),
    ("#### 50%", "50", RIGHT),
    ("#### 50", r"50\%", RIGHT),
    ("#### 0.5", "50%", RIGHT),
    ("#### 1/2", "50%", RIGHT),
    ("#### 50 percent", r"50\%", RIGHT),
    (r"\boxed{12.5 \%}", "1/8", RIGHT),
    ("#### 0.5%", "50%", WRONG),
    ("#### 0.5%", "50", WRONG),
    ("#### 0.5%", "0.5", WRONG),
    ("#### 1%", "1", RIGHT),
    ("#### 5000%", "50%", WRONG),
    # currency
    ("#### $1,016.00", "1016", RIGHT),
    (r"#### \$18", "18", RIGHT),
    ("#### 18", "$18", RIGHT),
    ("#### -$5", "-5", RIGHT),
    ("#### €5", "5", RIGHT),
    ("#### 5 €", "5", RIGHT),
    ("#### ￥5", "5", RIGHT),
    ("#### $5 per hour", "5", RIGHT),
    ("#### $5.50", "5.05", WRONG),
    # units are left out, and not compared
    (r"\boxed{5 \text{ apples}}", "5", RIGHT),
    ("#### 5 apples", "5", RIGHT),
    ("#### 5", "5 apples", RIGHT),
    ("#### 5 km", "5", RIGHT),
    ("#### 5km", "5", RIGHT),
    ("#### 5 km/h", "5", RIGHT),
    ("#### 5 miles per hour", "5", RIGHT),
    (r"\boxed{5\text{ cm}^2}", "5", RIGHT),
    (r"\boxed{5\ \mathrm{m/s^2}}", "5", RIGHT),
    ("#### 5 cm²", "5", RIGHT),
    ("#### 25 square units", "25", RIGHT),
    ("#### 42个", "42", RIGHT),
    ("#### 5 千克", "5", RIGHT),
    ("#### 5千", "5", WRONG),
    ("#### 5 m", "5", RIGHT),
    ("#### 5m", "5", WRONG),  # five m, with m a variable
    ("#### 5x", "5", WRONG),
    ("#### 5 x", "5", WRONG),
    (r"\boxed{5c}", "5", WRONG),
    (r"\boxed{5\pi}", "5", WRONG),
    ("#### 5 m", "500", WRONG),
    ("#### apples", "5", WRONG),
    # words that change the value are not units
    ("#### 5 million", "5000000", RIGHT),
    ("#### $2.5 million", "2,500,000", RIGHT),
    ("#### 5万", "50000", RIGHT),
    ("#### 5 million", "5", WRONG),
    ("#### 5 squared", "5", WRONG),
    ("#### 5 dozen", "5", WRONG),
    ("#### 5 thirds", "5", WRONG),
    ("#### 5 and a half", "5", WRONG),
    ("#### 5 Million", "5000000", RIGHT),
    ("#### 5 Million", "5", WRONG),
    ("#### 2 quadrillion", "2000000000000000", RIGHT),
    ("#### 2 quadrillion", "2", WRONG),
    ("#### 5 lakh", "500,000", RIGHT),
    ("#### 5 lakh", "5", WRONG),
    ("#### 5 crore", "5", WRONG),
    ("#### 3 twentieths", "0.15", RIGHT),
    ("#### 3 twentieths", "3", WRONG),
    ("#### 5 millionths", "5", WRONG),
    ("#### 1 third", r"\frac{1}{3}", RIGHT),
    ("#### 2-thirds", r"\frac{2}{3}", RIGHT),
    ("#### 20 fifth graders", "20", RIGHT),
    ("#### 20 fifth graders", "4", WRONG),
    ("#### 5 half days", "5", WRONG),
    ("#### 5 doubled", "5", WRONG),
    ("#### 5 wrong", "5", WRONG),
    ("#### 5 wrong answers", "5", RIGHT),
    # words between numbers are not units with a power
    ("#### 5 cm^3", "5", RIGHT),
    ("#### 5 cm3", "5", RIGHT),
    ("#### 5 meters^2", "5", RIGHT),
    ("#### 6 choose 3", "6", WRONG),
    ("#### 5 mod 3", "5", WRONG),
    ("#### 9 divided 3", "9", WRONG),
    ("#### 5 maybe 3", "5", WRONG),
    ("#### 1 in 3", "1", WRONG),
    ("#### 1", "1 in 3", WRONG),
    ("#### 3 in 1", "1 in 3", WRONG),
    ("#### 1 in 3", "1 in 3", RIGHT),
    ("#### 7 boys 2 girls", "7 boys 3 girls", WRONG),
    ("#### 3 girls, 7 boys", "7 boys 3 girls", RIGHT),
    ("#### 5 apples 3 pears", "5 apples 2 oranges", WRONG),
    # neither are products and Greek letters
    (r"\boxed{6xyz}", r"6\,xyz", RIGHT),
    (r"\boxed{6}", r"6\,xyz", WRONG),
    (r"\boxed{5(xyz)}", "5", WRONG),
    (r"\boxed{2x + 6}", "2x + 6 abc", WRONG),
    (r"\boxed{2x + 6 \text{ dollars}}", "2x + 6", RIGHT),
    (r"\boxed{2\lambda}", "2lambda", RIGHT),
    (r"\boxed{2}", "2lambda", WRONG),
    (r"\boxed{2lambda}", "2", WRONG),
    (r"\boxed{\text{Gamma rays}}", "gamma rays", RIGHT),
    # a slash before a single letter is a division
    ("#### $5/hour", "5", RIGHT),
    (r"\boxed{1/s}", r"\frac{1}{s}", RIGHT),
    (r"\boxed{1}", "1/s", WRONG),
    (r"\boxed{1/h}", "1/s", WRONG),
    (r"\boxed{5/m}", "5", WRONG),
    # am and pm
    ("#### 5 p.m.", "5 pm", RIGHT),
    ("#### 5PM", "5 pm", RIGHT),
    ("#### 5", "5 pm", RIGHT),
    ("#### 5 a.m.", "5 pm", WRONG),
    (r"\boxed{5 ma}", "5 am", WRONG),
    # degrees
    (r"\boxed{90^\circ}", "90", RIGHT),
    (r"\boxed{90}", r"90^{\circ}", RIGHT),
    ("#### 90°", "90", RIGHT),
    ("#### 90 degrees", r"90^\circ", RIGHT),
    # scientific notation
    ("#### 1e3", "1000", RIGHT),
    ("#### 1.5E-2", "0.015", RIGHT),
    (r"\boxed{1.5\times 10^3}", "1500", RIGHT),
    (r"\boxed{1.5 \cdot 10^{-2}}", "0.015", RIGHT),
    ("#### 1.5 x 10^3", "1500", RIGHT),
    ("#### 1.5×10³", "1500", RIGHT),
    ("#### 10^3", "1000", RIGHT),
    (r"\boxed{10^{-3}}", "0.001", RIGHT),
    ("#### 1000", r"10^3", RIGHT),
    ("#### e3", "1000", WRONG),
    ("#### 1.5e3", "15000", WRONG),
    ("#### -", "0", WRONG),
    #
    # UNEVALUATED ARITHMETIC IS NOT A NUMBER
    ("#### 737+844", "1581", WRONG),
    (r"\boxed{2+3}", "5", WRONG),
    (r"\boxed{6 \times 7}", "42", WRONG),
    (r"\boxed{6*7}", "42", WRONG),
    (r"\boxed{48/2}", "24", WRONG),
    (r"\boxed{\frac{48}{2}}", "24", WRONG),
    (r"\boxed{2^{10}}", "1024", WRONG),
    (r"\boxed{\sqrt{16}}", "4", WRONG),
    (r"\boxed{5!}", "120", WRONG),
    (r"\boxed{\binom{5}{2}}", "10", WRONG),
    (r"\boxed{\log_2 8}", "3", WRONG),
    (r"\boxed{2(3)}", "6", WRONG),
    (r"\boxed{1.5/2}", "0.75", WRONG),
    (r"\boxed{(1+1, 2)}", "(2,2)", WRONG),
    # unless the gold answer is unevaluated as well
    (r"\boxed{2^{10}}", "2^{10}", RIGHT),
    (r"\boxed{1024}", "2^{10}", RIGHT),
    (r"\boxed{1025}", "2^{10}", WRONG),
    (r"\boxed{4}", r"\sqrt{16}", RIGHT),
    (r"\boxed{3}", r"\log_2 8", RIGHT),
    #
    # EXPRESSIONS
    # polynomials and fractions
    (r"\boxed{x^2+2x+1}", "(x+1)^2", RIGHT),
    (r"\boxed{x^2 + 2*x + 1}", "(x+1)^2", RIGHT),
    (r"\boxed{x**2+1}", "x^2+1", RIGHT),
    (r"\boxed{(x+1)(x-1)}", "x^2-1", RIGHT),
    (r"\boxed{x+1}", "x+2", WRONG),
    (r"\boxed{x}", "y", WRONG),
    (r"\boxed{x^2}", "x^3", WRONG),
    (r"\boxed{\frac{n(n+1)}{2}}", "n(n+1)/2", RIGHT),
    (r"\boxed{x^{a+b}(y^{c+d})}", "x^{a+b}y^{c+d}", RIGHT),
    (r"\boxed{2xyz}", "2zyx", RIGHT),
    (r"\boxed{5c}", "5c", RIGHT),
    (r"\boxed{5}", "5c", WRONG),  # not a unit
    (r"\boxed{2x + 3t}", "2x+3", WRONG),
    (r"\boxed{2.5x}", r"\frac{5}{2}x", RIGHT),
    (r"\boxed{x²}", "x^2", RIGHT),
    (r"\boxed{x_1 + x_2}", "x_2+x_1", RIGHT),
    (r"\boxed{2\theta}", r"\theta+\theta", RIGHT),
    (r"\boxed{x^{1000}}", "x^{1000}", RIGHT),
    # roots
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", RIGHT),
    (r"\boxed{2\sqrt2}", r"2\sqrt{2}", RIGHT),
    (r"\boxed{2√2}", r"2\sqrt{2}", RIGHT),
    (r"\boxed{2*sqrt(2)}", r"2\sqrt{2}", RIGHT),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", RIGHT),
    (r"\boxed{\sqrt[3]{2}}", "2^{1/3}", RIGHT),
    (r"\boxed{|x|}", r"\sqrt{x^2}", RIGHT),
    (r"\boxed{x}", r"\sqrt{x^2}", WRONG),
    (r"\boxed{2\sqrt{3}}", r"3\sqrt{2}", WRONG),
    # a rounded number is not the exact one
    (r"\boxed{3.4641}", r"2\sqrt{3}", WRONG),
    (r"\boxed{3.464101615137754}", r"2\sqrt{3}", WRONG),
    (r"\boxed{3.14159265}", r"\pi", WRONG),
    (r"\boxed{\pi}", "3.14", WRONG),
    (r"\boxed{\frac{22}{7}}", r"\pi", WRONG),
    (r"\boxed{0.3333333333}", r"\frac{\sqrt{4}}{6}", WRONG),
    (r"\boxed{0.5}", r"\frac{\sqrt{4}}{4}", RIGHT),
    (r"\boxed{0.1x}", r"\frac{x}{10}", RIGHT),  # also exact
    (r"\boxed{5!=120}", "120", RIGHT),
    (r"\boxed{5!=121}", "121", WRONG),
    (r"\boxed{a != 2}", r"a \ne 2", RIGHT),
    (r"\boxed{6+\sqrt{2}}", r"2(3)+\sqrt{2}", RIGHT),  # not a mixed number
    (r"\boxed{? \frac{1}{2}}", r"\frac{\sqrt{4}}{4}", WRONG),  # the piece that can be read is not the answer
    # functions and constants
    (r"\boxed{\sin x}", "sin(x)", RIGHT),
    (r"\boxed{\sin^2 x + \cos^2 x}", r"\sin^2 y+\cos^2 y", RIGHT),
    (r"\boxed{\sin x}", r"\cos x", WRONG),
    (r"\boxed{2\ln x}", r"\ln x^2", RIGHT),
    (r"\boxed{2π}", r"2\pi", RIGHT),
    (r"\boxed{2 pi}", r"2\pi", RIGHT),
    (r"\boxed{e^{-x^2/2}}", r"e^{-\frac{x^2}{2}}", RIGHT),
    (r"\boxed{n!}", "n!", RIGHT),
    (r"\boxed{\lfloor x \rfloor}", r"\lfloor x\rfloor", RIGHT),
    (r"\boxed{f(x)+1}", "1+f(x)", RIGHT),
    (r"\boxed{\infty}", r"\infty", RIGHT),
    (r"\boxed{-\infty}", r"\infty", WRONG),
    # complex numbers
    (r"\boxed{4i+3}", "3+4i", RIGHT),
    (r"\boxed{\frac{1+i}{2}}", r"\frac{1}{2}+\frac{i}{2}", RIGHT),
    (r"\boxed{\frac{1}{1-i}}", r"\frac{1+i}{2}", RIGHT),
    (r"\boxed{3-4i}", "3+4i", WRONG),
    (r"\boxed{3+4I}", "3+4i", RIGHT),
    # I is a variable if there are others
    (r"\boxed{RI^2}", "I^2R", RIGHT),
    (r"\boxed{-R}", "I^2R", WRONG),
    (r"\boxed{\frac{V}{I}}", "V/I", RIGHT),
    (r"\boxed{-VI}", r"\frac{V}{I}", WRONG),
    # matrices
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", RIGHT),
    (r"\boxed{\begin{bmatrix}0.5&2\\3&4\end{bmatrix}}", r"\begin{pmatrix}\frac12&2\\3&4\end{pmatrix}", RIGHT),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", WRONG),
    (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
    (r"\boxed{\begin{pmatrix}1\\2", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
    #
    # WORDS
    ("The answer is B.", "B", RIGHT),
    (r"\boxed{\text{(C)}}", "C", RIGHT),
    (r"\boxed{b}", "B", RIGHT),
    (r"\boxed{A}", "B", WRONG),
    (r"\boxed{A, B}", "A", WRONG),
    (r"\boxed{\text{East}}", "east", RIGHT),
    (r"\boxed{east}", r"\text{east}", RIGHT),
    (r"\boxed{seat}", r"\text{east}", WRONG),  # not a product of letters
    (r"\boxed{\text{no solution}}", "No solution", RIGHT),
    ("答案是星期三。", "星期三", RIGHT),
    ("答案是星期二。", "星期三", WRONG),
    (r"\boxed{yes}", "no", WRONG),
    (r"\boxed{yes and no}", "yes", WRONG),
    (r"\boxed{\text{twenty one}}", "twenty-one", RIGHT),
    (r"\boxed{route66}", "Route 66", RIGHT),
    (r"\boxed{Route 6.6}", "Route 66", WRONG),
    (r"\boxed{June 2.0}", "June 20", WRONG),
    (r"\boxed{June 2 0}", "June 20", WRONG),
    (r"\boxed{x y z}", "xyz", RIGHT),
    (r"\boxed{x+y+z}", "xyz", WRONG),
    (r"\boxed{x-y-z}", "xyz", WRONG),
    (r"\boxed{x^{y-z}}", "xyz", WRONG),
    # words of two letters, unlike products
    (r"\boxed{ba}", "ab", RIGHT),
    (r"\boxed{a b}", "ab", RIGHT),
    (r"\boxed{am}", "ma", RIGHT),
    (r"\boxed{ma}", "am", WRONG),
    (r"\boxed{No}", "no", RIGHT),
    (r"\boxed{on}", "no", WRONG),
    (r"\boxed{\text{VI}}", "VI", RIGHT),
    (r"\boxed{IV}", "VI", WRONG),
    (r"\boxed{IX}", "XI", WRONG),
    (r"\boxed{-1}", "II", WRONG),
    #
    # LISTS, TUPLES, SETS, INTERVALS
    # a bare list is unordered
    (r"\boxed{1, 2}", "1,2", RIGHT),
    (r"\boxed{2, 1}", "1, 2", RIGHT),
    (r"\boxed{1 \text{ and } 2}", "1,2", RIGHT),
    ("#### 2 or 1", "1, 2", RIGHT),
    ("答案是 1、2 和 3。", "1,2,3", RIGHT),
    ("#### 1, 2, and 3", "1,2,3", RIGHT),
    (r"\boxed{1, 2}", "1,2,3", WRONG),
    (r"\boxed{1, 2, 3}", "1,2", WRONG),
    (r"\boxed{1, 1, 2}", "1,2", WRONG),
    (r"\boxed{1, 2, 2}", "1,1,2", WRONG),
    (r"\boxed{\frac12, \sqrt2}", r"\sqrt{2}, 0.5", RIGHT),
    (r"\boxed{\pm 5}", "5, -5", RIGHT),
    (r"\boxed{1 \pm \sqrt{2}}", r"1-\sqrt2, 1+\sqrt2", RIGHT),
    (r"\boxed{\pm 5}", "5", WRONG),
    # a tuple is ordered
    (r"\boxed{(1,2)}", "(1,2)", RIGHT),
    (r"\boxed{(1, 2)}", r"\left(1,2\right)", RIGHT),
    (r"\boxed{(2,1)}", "(1,2)", WRONG),
    (r"\boxed{(1,2,3)}", "(1,2)", WRONG),
    (r"\boxed{(\frac{2}{4}, 2)}", "(0.5,2)", RIGHT),
    (r"\boxed{\langle 1,2 \rangle}", "(1,2)", RIGHT),
    (r"\boxed{(100,200)}", "(100, 200)", RIGHT),  # no thousands inside brackets
    (r"\boxed{(2,3),(0,1)}", "(0,1),(2,3)", RIGHT),
    (r"\boxed{(5)}", "5", RIGHT),
    (r"\boxed{(1,2),}", "(1,2)", RIGHT),
    # a list without brackets matches a tuple in the same order
    (r"\boxed{1,2}", "(1,2)", RIGHT),
    (r"\boxed{2,1}", "(1,2)", WRONG),
    (r"\boxed{1 \text{ or } 2}", "(1,2)", WRONG),
    (r"\boxed{(1,2)}", "1,2", RIGHT),
    (r"\boxed{[1,2,3]}", "1,2,3", RIGHT),
    # sets
    (r"\boxed{\{1,2\}}", r"\{2,1\}", RIGHT),
    (r"\boxed{1,2}", r"\{2,1\}", RIGHT),
    (r"\boxed{\{1,2\}}", "2,1", RIGHT),
    (r"\boxed{\{5\}}", "5", RIGHT),
    (r"\boxed{(1,2)}", r"\{1,2\}", WRONG),
    (r"\boxed{\{1,3\}}", r"\{1,2\}", WRONG),
    (r"\boxed{\emptyset}", r"\varnothing", RIGHT),
    (r"\boxed{\{\}}", r"\emptyset", RIGHT),
    (r"\boxed{0}", r"\emptyset", WRONG),
    # intervals: the ends count
    (r"\boxed{[1,2)}", "[1,2)", RIGHT),
    (r"\boxed{(1,2)}", "[1,2)", WRONG),
    (r"\boxed{[1,2]}", "(1,2)", WRONG),
    (r"\boxed{[2,1)}", "[1,2)", WRONG),
    (r"\boxed{(-\infty, 0.5]}", r"(-\infty,\frac{1}{2}]", RIGHT),
    (r"\boxed{(-\infty,5)\cup(7,\infty)}", r"(7,\infty) \cup (-\infty, 5)", RIGHT),
    (r"\boxed{(-\infty,5)\cup(8,\infty)}", r"(-\infty,5)\cup(7,\infty)", WRONG),
    (r"\boxed{(-\infty,5)}", r"(-\infty,5)\cup(7,\infty)", WRONG),
    (r"\boxed{\mathbb{R}}", r"\mathbb{R}", RIGHT),
    (r"\boxed{\mathbb{R}\setminus\{0\}}", r"\mathbb{R} \setminus \{0\}", RIGHT),
    #
    # EQUATIONS AND INEQUALITIES
    # a name and a value
    (r"\boxed{x=5}", "5", RIGHT),
    (r"\boxed{x = 5}", "x=5", RIGHT),
    (r"\boxed{5}", "x=5", RIGHT),
    (r"\boxed{5=x}", "x=5", RIGHT),
    (r"\boxed{y=5}", "x=5", WRONG),
    (r"\boxed{x=6}", "5", WRONG),
    (r"\boxed{f(2)=5}", "5", RIGHT),
    (r"\boxed{x_1 = 5}", "5", RIGHT),
    (r"\boxed{a+b=5}", "5", RIGHT),
    (r"\boxed{\text{Area} = 5 \text{ cm}^2}", "5", RIGHT),
    (r"\boxed{x \approx 3.14}", "3.14", RIGHT),
    (r"\boxed{\approx 3.14}", "3.14", RIGHT),
    (r"\boxed{x=\frac{10}{4}}", "2.5", RIGHT),
    (r"\boxed{(x,y)=(1,2)}", "(1,2)", RIGHT),
    (r"\boxed{x=1, y=2}", "y=2, x=1", RIGHT),
    (r"\boxed{x=1, y=2}", "(1,2)", RIGHT),
    (r"\boxed{x=2, y=1}", "(1,2)", WRONG),
    # values without names are in the order of the names
    (r"\boxed{(1,2)}", "y=2, x=1", RIGHT),
    (r"\boxed{1, 2}", "x=1, y=2", RIGHT),
    (r"\boxed{(2,1)}", "y=2, x=1", WRONG),
    (r"\boxed{2, 1}", "x=1, y=2", WRONG),
    (r"\boxed{\{1,2\}}", "x=1, y=2", WRONG),
    (r"\boxed{1, 2}", "x=2 or x=1", RIGHT),
    (r"\boxed{x=1 \text{ or } x=2}", "2, 1", RIGHT),
    (r"\boxed{x = \pm 2}", "-2, 2", RIGHT),
    (r"\boxed{x \in \{1,2\}}", r"\{1,2\}", RIGHT),
    # a chain: every step has to be right
    (r"\boxed{x = 2+3 = 5}", "5", RIGHT),
    (r"\boxed{2+3=5}", "5", RIGHT),
    (r"\boxed{x = 5 = 6}", "6", WRONG),
    (r"\boxed{x = 5 = 6}", "5", WRONG),
    (r"\boxed{4=5}", "5", WRONG),
    (r"\boxed{5 = 2+3}", "5", WRONG),
    (r"\boxed{x = 2+3}", "5", WRONG),
    # equations that are the answer
    (r"\boxed{y = 3+2x}", "y=2x+3", RIGHT),
    (r"\boxed{2x+3}", "y=2x+3", RIGHT),
    (r"\boxed{2x - y + 3 = 0}", "y=2x+3", RIGHT),
    (r"\boxed{2x+4y=6}", "x+2y=3", RIGHT),
    (r"\boxed{x^2+y^2-25=0}", "x^2+y^2=25", RIGHT),
    (r"\boxed{25}", "x^2+y^2=25", WRONG),
    (r"\boxed{y = 2x+4}", "y=2x+3", WRONG),
    (r"\boxed{f(x) = x+1}", "f(x)=1+x", RIGHT),
    # an equation that merely implies the gold answer, or says nothing, is not solved
    (r"\boxed{5x=25}", "x=5", WRONG),
    (r"\boxed{\ln x = 1}", "1", WRONG),
    (r"\boxed{\log_2(x) = 3}", "3", WRONG),
    (r"\boxed{x! = 120}", "120", WRONG),
    (r"\boxed{\log_6(216) = 3}", "3", RIGHT),
    (r"\boxed{\cos A = \frac12}", "0.5", RIGHT),
    (r"\boxed{1}", r"\ln x = 1", RIGHT),
    (r"\boxed{2x-5=5}", "5", WRONG),
    (r"\boxed{x-5=0}", "x=5", WRONG),
    (r"\boxed{x=x}", "x=5", WRONG),
    (r"\boxed{0=0}", "x=5", WRONG),
    (r"\boxed{5=5}", "x=5", WRONG),
    (r"\boxed{x=}", "5", WRONG),
    (r"\boxed{=5}", "5", WRONG),
    # inequalities
    (r"\boxed{x>5}", "x>5", RIGHT),
    (r"\boxed{5<x}", "x>5", RIGHT),
    (r"\boxed{(5,\infty)}", "x>5", RIGHT),
    (r"\boxed{x>5}", r"(5,\infty)", RIGHT),
    (r"\boxed{x \in (5, \infty)}", "x>5", RIGHT),
    (r"\boxed{x \geq 5}", r"x\ge5", RIGHT),
    (r"\boxed{x≥5}", r"[5,\infty)", RIGHT),
    (r"\boxed{1 < x \leq 2}", "(1,2]", RIGHT),
    (r"\boxed{2 \ge x > 1}", "(1,2]", RIGHT),
    (r"\boxed{x<1 \text{ or } x>5}", r"(-\infty,1)\cup(5,\infty)", RIGHT),
    (r"\boxed{y > 2x+1}", "y-2x>1", RIGHT),
    (r"\boxed{2y \ge 4x+2}", r"y\ge 2x+1", RIGHT),
    (r"\boxed{x \ge 5}", "x>5", WRONG),
    (r"\boxed{x<5}", "x>5", WRONG),
    (r"\boxed{y>5}", "x>5", WRONG),
    (r"\boxed{2x>10}", "x>5", WRONG),
    (r"\boxed{x^2>4}", r"(-\infty,-2)\cup(2,\infty)", WRONG),
    (r"\boxed{y < 2x+1}", "y>2x+1", WRONG),
    (r"\boxed{3<4}", "1<2", WRONG),
    #
    # SEVERAL CANDIDATES ARE NOT AN ANSWER
    (r"\boxed{1 or 2}", "2", WRONG),
    (r"\boxed{5, 6}", "5", WRONG),
    (r"\boxed{5, 6}", "6", WRONG),
    (r"\boxed{5; 6}", "5", WRONG),
    (r"\boxed{5 \text{ or } 6}", "5", WRONG),
    (r"\boxed{5 \lor 6}", "5", WRONG),
    (r"\boxed{5 或 6}", "5", WRONG),
    (r"\boxed{5/6}", "5", WRONG),
    (r"\boxed{5|6}", "5", WRONG),
    (r"\boxed{5 6}", "5", WRONG),
    (r"\boxed{5\\6}", "5", WRONG),
    (r"\boxed{5 \quad 6}", "5", WRONG),
    (r"\boxed{5-6}", "5", WRONG),
    (r"\boxed{5 (or 6)}", "5", WRONG),
    (r"\boxed{5 maybe six}", "5", WRONG),
    (r"\boxed{\{5, 6\}}", "5", WRONG),
    (r"\boxed{(5, 6)}", "5", WRONG),
    (r"\boxed{x=5, x=6}", "5", WRONG),
    (r"\boxed{x=5 \text{ or } x=6}", "6", WRONG),
    (r"\boxed{5} or \boxed{6}", "5", WRONG),
    ("The answer is 5 or the answer is 6", "5", WRONG),
    ("#### 5, maybe 6", "5", WRONG),
    ("<answer>5 6 7 8 9</answer>", "7", WRONG),
    (r"\boxed{5, 5}", "5", WRONG),
    (r"\boxed{0..9}", "5", WRONG),
    (r"\boxed{\text{the number is 5}}", "5", WRONG),
    #
    # EXACT HOWEVER LARGE THE NUMBERS
    (r"\boxed{2^{100}}", r"2^{100}-1", WRONG),
    (r"\boxed{2^{2024}-2}", r"2^{2024}-1", WRONG),
    (r"\boxed{100!}", "100!-1", WRONG),
    (r"\boxed{1}", r"1-\frac{1}{2^{100}}", WRONG),
    (r"\boxed{2 \cdot 2^{99}-1}", r"2^{100}-1", RIGHT),
    # piecewise functions differ beyond their breaks
    (r"\boxed{|x-5|}", "5-x", WRONG),
    (r"\boxed{\lceil n/4 \rceil}", r"\lceil n/7 \rceil", WRONG),
    (r"\boxed{|5-x|}", "|x-5|", RIGHT),
    (r"\boxed{5-x}", r"\sqrt{(x-5)^2}", WRONG),
    (r"\boxed{\sqrt{x^2-10x+25}}", "5-x", WRONG),
    (r"\boxed{\sqrt{x^2-10x+25}}", "|x-5|", RIGHT),
    (r"\boxed{\sqrt{4(9-x^2)}}", r"2\sqrt{9-x^2}", RIGHT),
    (r"\boxed{\sqrt{x/y}}", r"\frac{\sqrt{x}}{\sqrt{y}}", RIGHT),
    (r"\boxed{(x-9)^{1/3}}", r"\sqrt[3]{x-9}", RIGHT),
    (r"\boxed{\sqrt{x}+3}", r"\frac{x-9}{\sqrt{x}-3}", RIGHT),
    #
    # WORDS, BASES AND COLONS THAT CARRY THE MEANING
    (r"\boxed{101_3}", "101_2", WRONG),
    (r"\boxed{101_{2}}", "101_2", RIGHT),
    ("#### 20 July", "20 June", WRONG),
    ("#### 5 km south", "5 km north", WRONG),
    ("#### 2 boys and 3 girls", "3 boys and 2 girls", WRONG),
    ("#### 2 girls and 3 boys", "3 boys and 2 girls", RIGHT),
    # amounts in several units
    ("#### 2 hours and 30 minutes", "2 hours 30 minutes", RIGHT),
    (r"\boxed{2 \text{ hrs } 30 \text{ mins}}", "2 hours, 30 minutes", RIGHT),
    ("#### 30 minutes and 2 hours", "2 hours and 30 minutes", RIGHT),
    ("#### 150 minutes", "2 hours 30 minutes", RIGHT),
    ("#### 2.5 hours", "2 hours 30 minutes", RIGHT),
    ("#### 1 hour 30 minutes", "90 minutes", RIGHT),
    ("#### 66 inches", "5 ft 6 in", RIGHT),
    ("#### 2 hours 31 minutes", "2 hours 30 minutes", WRONG),
    ("#### 30 minutes", "2 hours 30 minutes", WRONG),
    ("#### 150", "2 hours 30 minutes", WRONG),
    ("#### 150 inches", "2 hours 30 minutes", WRONG),
    ("#### 2 pounds 30 minutes", "2 hours 30 minutes", WRONG),
    # absolute values between numbers
    (r"\boxed{z \in [-\frac{3}{2}, -1] \cup [1, \frac{3}{2}]}", r"1\leq|z|\leq \frac{3}{2}", RIGHT),
    (r"\boxed{-3 < x < 3}", "|x| < 3", RIGHT),
    (r"\boxed{|x| < 3}", "(-3, 3)", RIGHT),
    (r"\boxed{x \le -2 \text{ or } x \ge 2}", r"|x| \ge 2", RIGHT),
    (r"\boxed{(-2,-1) \cup (1,2)}", "2 > |x| > 1", RIGHT),
    (r"\boxed{[-2,-1] \cup [1,2]}", "1 < |x| < 2", WRONG),
    (r"\boxed{(1,2)}", "1 < |x| < 2", WRONG),
    (r"\boxed{x > 3}", "|x| > 3", WRONG),
    (r"\boxed{(-3,3)}", "|x| < -3", WRONG),
    ("#### 5 millions", "5000000", RIGHT),
    ("#### 3 sevenths", r"\frac{3}{7}", RIGHT),
    ("#### 11:2", "1:12", WRONG),
    ("#### 7:11", "14:22", RIGHT),
    ("#### 20:34", "8:34 p.m.", RIGHT),
    ("#### 8:34 a.m.", "8:34 p.m.", WRONG),
    ("#### 8:34", "8:34", RIGHT),
    ("#### 83+4", "8:34", WRONG),
    ("#### 8-34", "8:34", WRONG),
    #
    # ARGUMENTS WITHOUT BRACES
    (r"\boxed{4x^2y^2}", "4x^{2}y^{2}", RIGHT),
    (r"\boxed{\frac\pi4}", r"\frac{\pi}{4}", RIGHT),
    (r"\boxed{\sqrt\pi}", r"\sqrt{\pi}", RIGHT),
    (r"\boxed{\sin^2(x)}", r"1-\cos^2 x", RIGHT),
    (r"\boxed{{a \over b}}", r"\frac{a}{b}", RIGHT),
    (r"\boxed{-(7)/(128)}", r"-\frac{7}{128}", RIGHT),
    (r"\boxed{\left[\begin{array}{cc}1&2\\3&4\end{array}\right]}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", RIGHT),
    (r"\boxed{12\text{ ft/sec}}", "12", RIGHT),
    #
    # EQUATIONS WHOSE RIGHT SIDE IS THE ANSWER
    (r"\boxed{(3,2)}", "(p,q)=(3,2)", RIGHT),
    (r"\boxed{x=1, y=2}", "(x,y)=(1,2)", RIGHT),
    (r"\boxed{1}", "|AB|=1", RIGHT),
    (r"\boxed{\frac12}", r"\cos A=\frac12", RIGHT),
    (r"\boxed{25}", "5x=25", WRONG),
    (r"\boxed{1}", "x+y=1", WRONG),
    #
    # THE SAME TEXT NEEDS NO PARSING
    (r"\boxed{f(2)<f(1)<f(4)}", "f(2) < f(1) < f(4)", RIGHT),
    (r"\boxed{2024^{4046}}", "2024^{4046}", RIGHT),
    #
    # WORDINGS
    (r"\boxed{(C) 42}", "C", RIGHT),
    (r"\boxed{(C) 42}", "42", RIGHT),
    (r"\boxed{(C) 42}", "B", WRONG),
    (r"\boxed{D}", "(D) Alina", RIGHT),
    (r"\boxed{C}", "(A) Cecile", WRONG),
    (r"\boxed{-2} and \boxed{1}", "1, -2", RIGHT),
    ("The answer is 42 because 6*7=42.", "42", RIGHT),
    ("<answer>The answer is 42</answer>", "42", RIGHT),
    ("#### `42`", "42", RIGHT),
    ("The answer is **42** dollars.", "42", RIGHT),
    ("#### **42** apples", "42", RIGHT),
    (r"\boxed{x**2 + y**2}", "x^2+y^2", RIGHT),
    ("答案选B。", "B", RIGHT),
    #
    # GOLD ANSWERS AS DATA SETS WRITE THEM
    ("#### 72", "Natalia sold 48/2 = 24 clips in May.\n#### 72", RIGHT),
    (r"\boxed{7}", r"We add them and get $\boxed{7}$.", RIGHT),
    ("#### 7", "The answer is 7.", RIGHT),
    ("#### 7", "$7$", RIGHT),
    ("#### 7", r"\[7\]", RIGHT),
    # if the gold answer cannot be parsed, the completion cannot be scored
    ("#### 1", "", UNSCORED),
    ("#### 1", " ", UNSCORED),
    ("#### 1", "no number here?", UNSCORED),
    ("nothing", "no number here?", UNSCORED),
    ("#### 1", "First we add all of the numbers, then we halve them", UNSCORED),
    ("#### 1", r"\int_0^1 x dx", UNSCORED),
    ("#### 1", r"\frac{1}{", UNSCORED),
    ("#### 1", "1/0", UNSCORED),
    ("#### 1", "x" * (MAX_CHARACTERS + 1), UNSCORED),
    ("#### " + "9" * 300, "9" * 300, UNSCORED),
    ("#### 1", "9^{9^{9^9}}", UNSCORED),
    ("#### 1", "x if x is even, 0 if not?", UNSCORED),
    ("#### 1", None, UNSCORED),
]

TOWER = "9^{9^{9^{9}}}"

# Text by which a model might break the reward, scored against gold answers of several kinds. All of it must score 0.0,
# quickly.
HOSTILE = [
    # numbers that do not fit into memory
    rf"\boxed{{{TOWER}}}",
    r"\boxed{9^9^9^9}",
    rf"\boxed{{e^{{-{TOWER}}}}}",
    rf"\boxed{{e^{{\pi {TOWER}}}}}",
    rf"\boxed{{\sqrt[{TOWER}]{{x}}}}",
    rf"\boxed{{\binom{{{TOWER}}}{{3}}}}",
    rf"\boxed{{(1,{TOWER})}}",
    rf"\boxed{{[1,{TOWER}]\cup[1,2]}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{10^{999999999}}",
    r"\boxed{(10^9)!}",
    r"\boxed{1000000000!}",
    r"\boxed{((9!)!)!}",
    r"\boxed{(1,((((9!)!)!)!)!)\cap(2,3)}",
    r"\boxed{(\sin(9^{99^{99}}),2)\cap(2,3)}",
    "#### 1e999999999",
    "#### " + "9" * (MAX_CHARACTERS + 1),
    "9" * 1_000_000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    # expressions that take forever
    r"\boxed{(x+1)^{99999}}",
    r"\boxed{((x+1)^{99}+1)^{99}}",
    r"\boxed{x^{x^{x^{x^{x}}}}}",
    r"\boxed{\sum_{n=1}^{10^9} n}",
    r"\boxed{\prod_{n=1}^{99999} n}",
    r"\boxed{\int_0^1 e^{x^2} dx}",
    r"\boxed{\lim_{x\to 0} \sin(x)/x}",
    r"\boxed{\frac{d}{dx} x^2}",
    r"\boxed{\operatorname{zeros}(99999,99999)}",
    r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}^{99999}}",
    r"\boxed{\begin{vmatrix}a&b\\c&d\end{vmatrix}}",
    r"\boxed{10^{10^{10}} \bmod 7}",
    # nesting and repetition
    r"\boxed{" * 500,
    r"\boxed{" * 10_000 + "1" + "}" * 10_000,
    r"\boxed{" + "(" * 10_000 + "1" + ")" * 10_000 + "}",
    r"\boxed{" + "(" * 100 + "1" + ")" * 100 + "}",
    r"\boxed{" + "[" * 100 + "1" + "]" * 100 + "}",
    r"\boxed{1+" + "(" * 100 + "x" + ")" * 100 + "}",
    r"\boxed{" + "x^{" * 60 + "x" + "}" * 60 + "}",
    r"\boxed{" + r"\frac{1}{1+" * 18 + "x" + "}" * 18 + "}",
    r"\boxed{" + "x_" * 120 + "x}",
    r"\boxed{" + "-" * 200 + "1}",
    r"\boxed{" + "|" * 200 + "}",
    r"\boxed{" + "x!" + "!" * 200 + "}",
    r"\boxed{" + "1," * 120 + "}",
    r"\boxed{" + "x=" * 100 + "}",
    r"\boxed{" + r"1\pm" * 60 + "1}",
    r"\boxed{" + r"\sin " * 40 + "x}",
    r"\boxed{" + "\\" * 255 + "}",
    r"\boxed{" + "5 " + "abc " * 60 + "}",
    # a megabyte
    "<answer>" * 125_000,
    "#" * 1_000_000,
    "#### \n" * 150_000,
    "answer is " * 100_000,
    "answer:" + "\n" * 1_000_000,
    "答案是" * 300_000,
    "</think>" * 125_000,
    "{" * 1_000_000,
    "$" * 1_000_000,
    " " * 1_000_000,
    "1," * 500_000,
    "<answer>42</answer>" + "x" * 1_000_000,  # too far from the end
    # characters
    "\x00" * 1000,
    "\\boxed{4\x002}",
    "\\boxed{\ud800}",
    "\\boxed{42\udc00}",
    "\\boxed{\u202e24\u202c}",
    "\\boxed{4\u03012}",
    "\\boxed{\U0001f642}",
    "\U0001f642" * 10_000,
    "\\boxed{Ⅴ}",
    "\\boxed{四十二}",
    # code, and what sympy knows by name
    "#### __import__('os').system('true')",
    r"\boxed{exit()}",
    r"\boxed{x.__class__}",
    r"\boxed{lambda: 42}",
    r"\boxed{\input{/etc/passwd}}",
    r"\boxed{nan}",
    r"\boxed{\infty - \infty}",
    r"\boxed{\frac{0}{0}}",
    r"\boxed{\frac{x}{0}}",
    r"\boxed{0^{-1}}",
    r"\boxed{\tan(\pi/2)}",
    r"\boxed{\ln 0}",
    r"\boxed{\text{True}}",
]

# The question, the model's answer, the gold answer and the score. A copied question is not an answer.
COPIES = [
    ("Simplify $(x+1)^2-x^2$.", "(x+1)^2-x^2", "2x+1", WRONG),
    ("Simplify $(x+1)^2-x^2$.", "1+2x", "2x+1", RIGHT),
    ("Factor x^2+5x+6.", "x^2+5x+6", "(x+2)(x+3)", WRONG),
    ("Factor x^2+5x+6.", "x^2 + 5x + 6", "(x+2)(x+3)", WRONG),
    ("Factor x^2+5x+6.", "(x+3)(x+2)", "(x+2)(x+3)", RIGHT),
    ("Expand (x+2)(x+3)", "(x+2)(x+3)", "x^2+5x+6", WRONG),
    ("Let y = 2x+1. What is y?", "2x+1", "1+2x", WRONG),
    ("Let y = 12x+1.", "2x+1", "1+2x", RIGHT),  # part of a longer expression
    ("Let y = 2x+1-z.", "2x+1", "1+2x", RIGHT),
    ("Let y = z-2x+1.", "2x+1", "1+2x", RIGHT),
    ("Reduce 6/8.", "6/8", "3/4", WRONG),
    ("Reduce 6/8.", "3/4", "3/4", RIGHT),
    ("What is half of 1? Write 1/2 or 0.5.", "1/2", "0.5", RIGHT),  # there is nothing left to compute
    ("Which is smaller, 2x+1 or 2x+2?", "2x+1", "2x+1", RIGHT),  # the gold answer is written the same way
    ("Is it (A) x=5 or (B) x=6?", "x=5", "5", RIGHT),
    ([{"role": "user", "content": "Factor x^2-1."}], "x^2-1", "(x+1)(x-1)", WRONG),
    # a gold answer that is only compared as text, and occurs in the prompt
    (r"Prove that $f(2)<f(1)<f(4)$.", "f(2)<f(1)<f(4)", "f(2)<f(1)<f(4)", UNSCORED),
    (r"Evaluate $\sum_{k=1}^n k$.", r"\sum_{k=1}^n k", r"\sum_{k=1}^{n} k", UNSCORED),
    (r"Order f(1), f(2) and f(4).", "f(2)<f(1)<f(4)", "f(2)<f(1)<f(4)", RIGHT),
]


@pytest.mark.parametrize(("completion", "gold", "reward"), CASES)
def test_table(completion, gold, reward):
    assert math_answer_reward([completion], answer=[gold]) == [reward]


@pytest.mark.slow
def test_the_table_is_bounded_off_the_main_thread():
    """Our time limit is a signal, which works only in the main thread. In other threads, no text may take longer than
    the time limit of a worker, or a training run would hang on one completion."""
    rows = [(completion, gold) for completion, gold, _ in CASES]
    rows += [(completion, gold) for completion in HOSTILE for gold in ("42", "x^2+1")]
    seconds, failures = [], []
    parse_expression.cache_clear()

    def score_all():
        for completion, gold in rows:
            started = time.thread_time()
            try:
                math_answer_reward([completion], answer=[gold])
            except BaseException as error:
                failures.append((completion[:80], gold, error))
            seconds.append((time.thread_time() - started, completion[:80], gold))

    thread = threading.Thread(target=score_all, daemon=True)
    thread.start()
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive(), f"stuck after {seconds[-1]}"
    assert not failures
    assert max(seconds)[0] < TIMEOUT, max(seconds)


@pytest.mark.slow
def test_the_parser_cache_is_bounded(monkeypatch):
    """ANTLR caches every parser state, so on random text its memory would grow without bound."""
    monkeypatch.setattr(expression, "MAX_PARSER_STATES", 1000)
    rng = random.Random(0)
    pieces = ["1", "x", "+", "-", "^{2}", r"\frac{1}{x}", r"\sin ", r"\sqrt{x}", "(x)", "|x|", "!", r"\log_{2}"]
    for _ in range(60):
        parse_expression("".join(rng.choices(pieces, k=12)))
        assert len(PSParser.sharedContextCache.cache) < 5000


@pytest.mark.parametrize("gold", ["42", "x^2+1", "(1,2)", "x=5", "east", r"\begin{pmatrix}1\\2\end{pmatrix}"])
def test_hostile_text_earns_nothing(gold):
    assert math_answer_reward(HOSTILE, answer=[gold] * len(HOSTILE)) == [WRONG] * len(HOSTILE)


@pytest.mark.parametrize(("prompt", "answer", "gold", "reward"), COPIES)
def test_a_copied_question_is_not_an_answer(prompt, answer, gold, reward):
    """Symbolic equality alone would reward the question itself, and a model would soon exploit that."""
    assert math_answer_reward([rf"\boxed{{{answer}}}"], answer=[gold], prompts=[prompt]) == [reward]


@pytest.mark.parametrize("gold", sorted({gold for _, gold, reward in CASES if reward == RIGHT}))
def test_the_gold_answer_itself_is_right(gold):
    assert math_answer_reward([rf"\boxed{{{extract_final_answer(gold) or gold}}}"], answer=[gold]) == [RIGHT]


def test_every_gold_answer_of_the_embedded_data_is_right():
    for split in ("train", "test"):
        gold = [json.loads(line)["answer"] for line in (TINY_DATA / f"{split}.jsonl").read_text().splitlines()]
        check_gold(gold)
        assert set(math_answer_reward([f"#### {answer}" for answer in gold], answer=gold)) == {RIGHT}


def test_gold_that_cannot_be_parsed_is_reported_with_its_row():
    """Otherwise its group would be silently excluded from every step."""
    check_gold(["42", "#### 72", r"We get $\boxed{\frac{1}{2}}$.", "(1,2)", "no solution", 7])
    bad = ["42", "no number here?", "", None, "x" * 300, "1/0", "?"]
    with pytest.raises(ValueError, match=r"6 of 7 gold answers cannot .* row 1: 'no number here\?', row 2: ''"):
        check_gold(bad)
    assert math_answer_reward(["#### 1"] * len(bad), answer=bad) == [WRONG] + [UNSCORED] * 6


@pytest.mark.parametrize("gold", [r"Yes. $F(x,y)=xy$", "y_1=x\ny_2=2x"])
def test_gold_that_its_own_text_does_not_satisfy_is_reported(gold):
    """A sentence ends in the middle of it, so that no completion in plain words could be right."""
    with pytest.raises(ValueError, match=r"1 of 2 gold answers cannot be parsed .* row 1"):
        check_gold(["42", gold])


def test_gold_that_is_compared_only_as_text_is_accepted():
    golds = ["f(2)<f(1)<f(4)", "42", "2024^{4046}", "(p,q)=(3,2)", r"\frac12=0.5", "Rs. 697.50", r"32,\! 349"]
    assert check_gold(golds) == [0, 2]


def test_strict_accepts_boxed_answers_only():
    strict = MathAnswerReward(strict=True)
    completions = [r"\boxed{42}", "#### 42", "<answer>42</answer>", "The answer is 42.", "42", r"\boxed{4"]
    assert strict(completions, answer=["#### 42"] * 6) == [RIGHT] + [WRONG] * 5
    assert math_answer_reward(completions, answer=["42"] * 6) == [RIGHT] * 5 + [WRONG]


def test_chat_completions_and_trl_columns():
    chat = [{"role": "assistant", "content": "so #### 42"}]
    tool = [{"role": "assistant", "content": None}]
    image = [{"role": "assistant", "content": [{"type": "image"}]}]
    completions = [chat, tool, image, []]
    rewards = math_answer_reward(
        completions=completions, answer=["42"] * 4, prompts=["q"] * 4, completion_ids=[[1]] * 4, trainer_state=None
    )
    assert rewards == [RIGHT, WRONG, WRONG, WRONG]
    with pytest.raises(ValueError, match="shorter"):
        math_answer_reward([chat, chat], answer=["42"])


def test_rewards_have_names_and_can_be_pickled():
    for reward, name in (
        (math_answer_reward, "math_answer_reward"),
        (MathAnswerReward(strict=True), "strict_math_answer_reward"),
    ):
        assert reward.__name__ == name
        assert pickle.loads(pickle.dumps(reward)) == reward


@pytest.mark.parametrize("module", ["grpo_ext.rewards", "grpo_ext.rewards.logic"])
def test_rewards_import_no_heavy_packages(module):
    """Workers import these modules, and so does anyone who scores text without a trainer."""
    heavy = {"torch", "trl", "transformers", "loky"}
    code = f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_timeout_does_not_last(monkeypatch):
    """If a failure to parse a gold answer in time were cached, the answer would be unreadable for the rest of the run,
    but only in this worker: the rewards of a group would depend on which worker scored it."""
    gold, answer = r"\frac{\sin(71x)+1}{3}", r"#### (\sin(71x)+1)/3"
    monkeypatch.setattr(expression, "TIME_LIMIT_SECONDS", 1e-6)
    assert math_answer_reward([answer], answer=[gold]) == [None]
    assert check_gold([gold]) == [0]
    monkeypatch.setattr(expression, "TIME_LIMIT_SECONDS", 60.0)
    assert math_answer_reward([answer], answer=[gold]) == [RIGHT]
    assert check_gold([gold]) == []
