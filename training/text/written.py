"""What is written but not said: currencies, units, abbreviations and symbols, with the words for them."""

from __future__ import annotations

__all__ = [
    "ABBREVIATIONS",
    "CURRENCIES",
    "FRACTIONS",
    "MAGNITUDES",
    "MONTHS",
    "ROMAN",
    "SAID_AS_WORDS",
    "SPELLED",
    "SYMBOLS",
    "UNITS",
]

_NAMES = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
MONTHS = {name.lower(): name for name in _NAMES} | {name[:3].lower(): name for name in _NAMES} | {"sept": "September"}
"""Names and short forms, lower case and without dot, in the order of the year."""

# sign: (one, many, one of its hundredths, many of them)
CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"),
}

MAGNITUDES = {
    **dict.fromkeys(("k", "thousand"), "thousand"),
    **dict.fromkeys(("m", "mn", "million"), "million"),
    **dict.fromkeys(("b", "bn", "billion"), "billion"),
    "trillion": "trillion",
}

# denominator: (one, many)
FRACTIONS = {
    2: ("half", "halves"),
    3: ("third", "thirds"),
    4: ("quarter", "quarters"),
    5: ("fifth", "fifths"),
    6: ("sixth", "sixths"),
    8: ("eighth", "eighths"),
    10: ("tenth", "tenths"),
}

# As written right after a number: (one, many). What may as well be a word or a size (`in`, `m`, `s`, `k`) is not here.
UNITS = {
    "km/h": ("kilometer per hour", "kilometers per hour"),
    "kmh": ("kilometer per hour", "kilometers per hour"),
    "kph": ("kilometer per hour", "kilometers per hour"),
    "mph": ("mile per hour", "miles per hour"),
    "km": ("kilometer", "kilometers"),
    "cm": ("centimeter", "centimeters"),
    "mm": ("millimeter", "millimeters"),
    "mi": ("mile", "miles"),
    "ft": ("foot", "feet"),
    "yd": ("yard", "yards"),
    "kg": ("kilogram", "kilograms"),
    "mg": ("milligram", "milligrams"),
    "lb": ("pound", "pounds"),
    "lbs": ("pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ml": ("milliliter", "milliliters"),
    "mL": ("milliliter", "milliliters"),
    "tsp": ("teaspoon", "teaspoons"),
    "tbsp": ("tablespoon", "tablespoons"),
    "hr": ("hour", "hours"),
    "hrs": ("hour", "hours"),
    "min": ("minute", "minutes"),
    "mins": ("minute", "minutes"),
    "sec": ("second", "seconds"),
    "secs": ("second", "seconds"),
    "ms": ("millisecond", "milliseconds"),
    "KB": ("kilobyte", "kilobytes"),
    "MB": ("megabyte", "megabytes"),
    "GB": ("gigabyte", "gigabytes"),
    "TB": ("terabyte", "terabytes"),
    "Hz": ("hertz", "hertz"),
    "kHz": ("kilohertz", "kilohertz"),
    "MHz": ("megahertz", "megahertz"),
    "GHz": ("gigahertz", "gigahertz"),
    "kW": ("kilowatt", "kilowatts"),
    "kWh": ("kilowatt hour", "kilowatt hours"),
    "dB": ("decibel", "decibels"),
    "bpm": ("beat per minute", "beats per minute"),
    "BPM": ("beat per minute", "beats per minute"),
    "sq ft": ("square foot", "square feet"),
    "USD": ("U S dollar", "U S dollars"),
    "EUR": ("euro", "euros"),
    "GBP": ("British pound", "British pounds"),
}

# (pattern after a border of words, what is said), case ignored
ABBREVIATIONS = (
    (r"dr\.", "doctor"),
    (r"mr\b\.?", "mister"),
    (r"mrs\b\.?", "missus"),
    (r"ms\.", "miss"),
    (r"prof\.", "professor"),
    (r"st\.", "street"),
    (r"ave\.", "avenue"),
    (r"blvd\b\.?", "boulevard"),
    (r"rd\.", "road"),
    (r"mt\.", "mount"),
    (r"ft\.|feat\.", "featuring"),
    (r"vs\b\.?", "versus"),
    (r"jr\b\.?", "junior"),
    (r"sr\.", "senior"),
    (r"approx\.", "approximately"),
    (r"e\.\s?g\.,?", "for example"),
    (r"i\.\s?e\.,?", "that is"),
    (r"etc\b\.?", "et cetera"),
    (r"w/o\b", "without"),
    (r"w/", "with "),
    (r"and/or\b", "and or"),
)

ROMAN = {"II": 2, "III": 3, "IV": 4, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "XI": 11, "XII": 12}

# Capitals that are said as words although the rule would spell them.
SAID_AS_WORDS = {"OK": "okay", "SIM": "SIM", "ZIP": "ZIP", "LED": "L E D", "PIN": "PIN", "RAM": "RAM", "VIP": "V I P"}

# Capitals that are spelled although the rule would read them.
SPELLED = frozenset({"ESPN", "IMDB", "YMCA", "ASAP", "UEFA", "NCAA", "HTML", "IEEE"})

SYMBOLS = {
    "&": "and",
    "+": "plus",
    "@": "at",
    "=": "equals",
    "/": " ",
    "~": "about",
    "<": "less than",
    ">": "more than",
}
