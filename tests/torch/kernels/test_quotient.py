"""x / s for x of at most 11 bits, without the residual step, lies on the right side of every tie, for all scales."""

from __future__ import annotations

from fractions import Fraction

from modelopt.numerics.elements import NF4_TABLE

ONE = Fraction(1)


def rounded(v: Fraction) -> Fraction:
    """Return RN(v) to 24 bits."""
    if v == 0:
        return v
    m = abs(v)
    e = m.numerator.bit_length() - m.denominator.bit_length()
    e = e - 1 if Fraction(2) ** e > m else e
    unit = Fraction(2) ** (e - 23)
    return round(v / unit) * unit  # round() goes to the even one on a tie


def fast(a: Fraction, s: Fraction) -> Fraction:
    """Return what `triton_math.quotient` with SHORT computes."""
    r = rounded(ONE / s)
    rest = rounded(rounded(1 - s * r) * rounded(r * (1 - Fraction(1, 2**23))))
    return rounded(a * r + rounded(a * rest))


def signed(a: Fraction, s: Fraction) -> Fraction:
    """Return what `hadamard/rounding.cu` computes for E4M3, 1 <= s < 2: with a reciprocal toward zero the rest is positive."""
    r = rounded(ONE / s)
    r = r - Fraction(1, 2**24) if s * r > 1 else r
    return rounded(a * r + rounded(a * rounded(rounded(1 - s * r) * rounded(r * (1 + Fraction(1, 2**23))))))


def test_no_short_quotient_crosses_a_tie():
    """All x / s closer than 2^-43 to the border between a tie T (up to 9 bits) and a neighbour of T in float32."""
    near = []
    for t in range(1, 512, 2):
        tie = t << (26 - t.bit_length())  # neighbours are 4 apart, below a power of two 2
        for border in (tie + 2, tie - (1 if t == 1 else 2)):
            for a in range(1, 2048, 2):
                shift = 22 + border.bit_length() - a.bit_length()
                for wide in (a << shift + 1, a << shift + 2, a << shift + 3):
                    for s in (wide // border, wide // border + 1):
                        if 2**23 <= s < 2**24 and abs(wide - s * border) << 43 < s * border:
                            near.append((tie, wide, s))
    assert [(tie, s) for tie, _, s in near] == [(2**25, 2**24 - 1)], "a scale of ones only, at ties that are powers of two"
    for tie, wide, s in near:
        border, a, scale = Fraction(tie, 2**26), Fraction(wide, 2**49), Fraction(s, 2**23)
        exact = rounded(a / scale)
        for got in (fast(a, scale), signed(a, scale)):  # neither is wrong by 2^-43
            assert (got > border, got < border) == (exact > border, exact < border)


def test_pieces_of_nf4_have_one_border_each_and_none_at_an_end():
    """What `triton_plan.nf4_table` and `triton_math.nf4_place` rely on."""
    places = [(a + b) / 2 * 15.5 + 15.5 for a, b in zip(NF4_TABLE, NF4_TABLE[1:], strict=False)]
    assert len({round(p) for p in places}) == 15
    assert min(abs(p % 1 - 0.5) for p in places) > 1e-3
