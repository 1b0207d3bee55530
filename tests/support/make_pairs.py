"""Writes the built-in pairs: ``python tests/support/make_pairs.py > gemma_tune/samples/pairs.jsonl``.

The better answer explains in a sentence and ends with the asked fact on a line of its own; the worse one apologises,
asks back or talks about the question. Either is the longer one about as often, so that length does not tell them apart.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator

Fact = tuple[str, str, str, str]  # question, what it is about, explanation, fact

_CAPITALS_EN = (
    ("Kenya", "Nairobi", "a city in the southern highlands"), ("Norway", "Oslo", "at the head of a long fjord"),
    ("Peru", "Lima", "on the desert coast of the Pacific"), ("Egypt", "Cairo", "just south of where the Nile divides"),
    ("Hungary", "Budapest", "on both banks of the Danube"), ("Cuba", "Havana", "on the north-western coast"),
    ("Portugal", "Lisbon", "at the mouth of the Tagus"), ("Poland", "Warsaw", "on the Vistula"),
    ("Ireland", "Dublin", "on the eastern coast"), ("Nepal", "Kathmandu", "in a valley of the Himalayas"),
    ("Greece", "Athens", "in the region of Attica"), ("Ghana", "Accra", "on the Gulf of Guinea"),
    ("Chile", "Santiago", "in the central valley below the Andes"), ("Finland", "Helsinki", "on the Gulf of Finland"),
    ("Vietnam", "Hanoi", "on the Red River in the north"), ("Austria", "Vienna", "in the east, on the Danube"))
_CAPITALS_ZH = (
    ("法国", "巴黎", "塞纳河畔"), ("日本", "东京", "本州岛的东岸"), ("泰国", "曼谷", "湄南河下游"), ("意大利", "罗马", "台伯河畔"),
    ("西班牙", "马德里", "国土的中部高原"), ("德国", "柏林", "国土的东北部"), ("俄罗斯", "莫斯科", "国土的欧洲部分"),
    ("韩国", "首尔", "汉江两岸"), ("蒙古国", "乌兰巴托", "图拉河谷"), ("加拿大", "渥太华", "安大略省的东部"),
    ("瑞典", "斯德哥尔摩", "梅拉伦湖入海的地方"), ("牙买加", "金斯敦", "岛的东南岸"), ("阿根廷", "布宜诺斯艾利斯", "拉普拉塔河口"),
    ("菲律宾", "马尼拉", "吕宋岛的海湾边"), ("比利时", "布鲁塞尔", "国土的中部"), ("丹麦", "哥本哈根", "西兰岛的东岸"))
_THINGS_EN = (("box", "boxes", "apples", 7, 8), ("shelf", "shelves", "books", 6, 12), ("row", "rows", "chairs", 9, 11),
              ("bag", "bags", "marbles", 4, 15), ("page", "pages", "stamps", 5, 16), ("table", "tables", "guests", 8, 6),
              ("tray", "trays", "eggs", 3, 30), ("coach", "coaches", "seats", 7, 52), ("carton", "cartons", "bottles", 12, 6),
              ("team", "teams", "players", 5, 11), ("album", "albums", "photos", 4, 45), ("field", "fields", "trees", 6, 25))
_THINGS_ZH = (("个篮子", "个梨", 6, 9), ("个书架", "本书", 5, 14), ("排座位", "把椅子", 8, 13), ("盒粉笔", "支粉笔", 4, 24),
              ("张桌子", "位客人", 7, 10), ("个班", "名学生", 3, 42), ("箱牛奶", "盒牛奶", 11, 12), ("辆车", "个座位", 6, 45),
              ("页", "张邮票", 9, 7), ("支队伍", "名队员", 5, 18), ("袋糖", "颗糖", 4, 35), ("层楼", "个房间", 12, 8))
_UNITS_EN = (("minutes", "hours", 3, 60, "An hour has 60 minutes"), ("days", "weeks", 6, 7, "A week has 7 days"),
             ("metres", "kilometres", 4, 1000, "A kilometre has 1000 metres"), ("months", "years", 5, 12, "A year has 12 months"),
             ("grams", "kilograms", 7, 1000, "A kilogram has 1000 grams"), ("seconds", "minutes", 9, 60, "A minute has 60 seconds"),
             ("hours", "days", 4, 24, "A day has 24 hours"), ("centimetres", "metres", 8, 100, "A metre has 100 centimetres"),
             ("years", "decades", 6, 10, "A decade has 10 years"), ("eggs", "dozens", 5, 12, "A dozen is 12 of them"))
_UNITS_ZH = (("分钟", "小时", 5, 60), ("天", "周", 8, 7), ("克", "千克", 3, 1000), ("厘米", "米", 6, 100), ("个月", "年", 4, 12),
             ("秒", "分钟", 7, 60), ("小时", "天", 3, 24), ("米", "千米", 9, 1000), ("年", "个世纪", 2, 100), ("毫升", "升", 5, 1000))
_ELEMENTS_EN = (("iron", "Fe", "the Latin ferrum"), ("gold", "Au", "the Latin aurum"), ("silver", "Ag", "the Latin argentum"),
                ("lead", "Pb", "the Latin plumbum"), ("tin", "Sn", "the Latin stannum"), ("copper", "Cu", "the Latin cuprum"),
                ("helium", "He", "the Greek word for the sun"), ("neon", "Ne", "the Greek word for new"),
                ("calcium", "Ca", "the Latin word for lime"), ("oxygen", "O", "the Greek word for sharp"))
_ELEMENTS_ZH = (("钠", "Na", "拉丁语 natrium"), ("钾", "K", "拉丁语 kalium"), ("汞", "Hg", "拉丁语 hydrargyrum"), ("氢", "H", "希腊语的“水”"),
                ("碳", "C", "拉丁语的“木炭”"), ("锂", "Li", "希腊语的“石头”"), ("氯", "Cl", "希腊语的“黄绿色”"), ("碘", "I", "希腊语的“紫色”"),
                ("磷", "P", "希腊语的“带来光”"), ("氩", "Ar", "希腊语的“懒惰”"))
_DAYS_EN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
_STEPS = ((0, 3), (1, 4), (2, 5), (3, 6), (4, 9), (5, 3), (6, 10), (0, 5), (2, 4), (4, 6), (1, 9), (3, 11))

_REST = {
    "en": (("I am sorry, I am not quite sure what to say here.", "Oh, that is a really good question!",
            "Thank you so much for asking me this.", "Hmm, well, let me think for a moment.",
            "I do apologise, but this is not easy.", "What an interesting thing to ask!",
            "As an assistant I always try to help.", "Sorry, I was not expecting this."),
           ("You would like to know {}, and many people wonder about that.", "Are you asking about {}?",
            "When it comes to {}, there are several ways to look at it.", "People have asked me about {} before.",
            "It is hard to talk about {} in a few words.", "So this is about {}, if I understand you correctly.",
            "There is a lot that could be said about {}."),
           ("Could you tell me a little more?", "It really depends on what you need.", "Perhaps you could look it up somewhere.",
            "I hope that this helps you further!", "Please let me know if there is anything else.")),
    "zh": (("抱歉，我不太确定该怎么说。", "哦，这真是一个好问题！", "非常感谢您的提问。", "嗯，让我想一想。", "不好意思，这个问题不太容易。",
            "您的问题很有意思！", "作为助手，我总是尽力帮忙。", "对不起，我没有想到您会问这个。"),
           ("您想知道{}，很多人都对此感到好奇。", "您是在问{}吗？", "说到{}，可以从几个方面来看。", "以前也有人问过我{}。",
            "{}很难用几句话说清楚。", "如果我没理解错，这是关于{}的问题。", "关于{}，可以说的有很多。"),
           ("您能再多说一点吗？", "这要看您的具体需要。", "也许您可以去查一查资料。", "希望这对您有所帮助！", "如果还有别的问题，请告诉我。"))}
_ENDS = {"en": "Answer: ", "zh": "答案："}


def _english() -> Iterator[Fact]:
    for n, (country, city, where) in enumerate(_CAPITALS_EN):
        asked = (f"What is the capital of {country}?", f"Which city is the capital of {country}?",
                 f"From which city is {country} governed?")[n % 3]
        yield asked, f"the capital of {country}", f"The government of {country} sits in {city}, {where}.", city
    for n, (one, many, things, count, each) in enumerate(_THINGS_EN):
        asked = (f"There are {count} {many} with {each} {things} each. How many {things} is that?",
                 f"How many {things} are there in {count} {many} if each {one} has {each}?")[n % 2]
        yield asked, f"the {things} in {count} {many}", f"Each {one} has {each}, so {count} of them make {count} × {each}.", \
            f"{count * each} {things}"
    for small, large, count, each, why in _UNITS_EN:
        asked = f"How many {small} are {count} {large}?"
        yield asked, f"{count} {large} in {small}", f"{why}, so it is {count} × {each}.", f"{count * each} {small}"
    for name, sign, origin in _ELEMENTS_EN:
        yield f"What is the chemical symbol of {name}?", f"the symbol of {name}", f"It was made from {origin}.", sign
    for start, steps in _STEPS:
        day = _DAYS_EN[start]
        weeks, rest = divmod(steps, 7)
        why = f"After {7 * weeks} days it is {day} again, and {rest} more follow." if weeks else \
            f"One counts {steps} days on from {day}."
        yield f"Today is {day}. Which day is it in {steps} days?", f"the day {steps} days after {day}", why, \
            _DAYS_EN[(start + steps) % 7]


def _chinese() -> Iterator[Fact]:
    for n, (country, city, where) in enumerate(_CAPITALS_ZH):
        asked = (f"{country}的首都是哪里？", f"哪座城市是{country}的首都？", f"请问{country}的首都叫什么？")[n % 3]
        yield asked, f"{country}的首都", f"{country}的政府设在{where}的{city}。", city
    for n, (many, things, count, each) in enumerate(_THINGS_ZH):
        asked = (f"每{many}有{each}{things}，{count}{many}一共有多少？", f"一共{count}{many}，每{many}{each}{things}，合计多少？")[n % 2]
        yield asked, f"{count}{many}的总数", f"每{many}{each}{things}，{count}{many}就是{count}×{each}。", f"{count * each}{things}"
    for small, large, count, each in _UNITS_ZH:
        yield f"{count}{large}等于多少{small}？", f"{count}{large}的换算", f"1{large}是{each}{small}，所以是{count}×{each}。", f"{count * each}{small}"
    for name, sign, origin in _ELEMENTS_ZH:
        yield f"{name}的化学符号是什么？", f"{name}的符号", f"它来自{origin}。", sign
    for start, steps in _STEPS:
        day = _DAYS_ZH[start]
        weeks, rest = divmod(steps, 7)
        why = f"过{7 * weeks}天又是{day}，再往后数{rest}天。" if weeks else f"从{day}往后数{steps}天。"
        yield f"今天是{day}，{steps}天以后是星期几？", f"{day}之后{steps}天", why, _DAYS_ZH[(start + steps) % 7]


def pairs() -> list[dict]:
    """The rows, both languages mixed."""
    rows = []
    for language, facts in (("en", _english()), ("zh", _chinese())):
        openers, middles, closers = _REST[language]
        space = " " if language == "en" else ""
        for n, (question, about, why, fact) in enumerate(facts):
            opener, closer = openers[n // 3 % len(openers)], closers[n // 3 % len(closers)]
            middle = middles[n % len(middles)].format(about)
            worse = [[opener, closer], [middle], [opener, middle]][n % 3]
            better = f"{why}\n{_ENDS[language]}{fact}"
            rows.append({"prompt": [{"role": "user", "content": question}],
                         "chosen": [{"role": "assistant", "content": better}],
                         "rejected": [{"role": "assistant", "content": space.join(worse)}]})
    random.Random(19).shuffle(rows)
    return rows


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    for row in pairs():
        print(json.dumps(row, ensure_ascii=False))
