"""The page of a trace in a headless Chromium: opened, clicked, scrolled, searched, by keyboard, in the light and in the
dark. `make test-pages` runs it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from landmark_cli.inference.trace import write_trace
from tests.inference.browser import chromium, opened
from tests.inference.test_trace import AWKWARD, trace_with
from tests.inference.traces import made_trace, novel_blocks
from tests.modules import load_script

pytestmark = pytest.mark.pages

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"width": 1280, "height": 800}
# What may be in the page at a time, of a text of any length: a screen of rows, a few lines of tokens, the heads.
MOST_ELEMENTS = 900
RAMP = [f"s{step}" for step in range(9)]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A trace of 100 thousand tokens, and its page."""
    trace, path = made_trace(), tmp_path_factory.mktemp("page") / "trace.html"
    write_trace(path, trace)
    return trace, path


@pytest.fixture
def page(browser, long):
    with opened(browser, long[1], viewport=WIDE) as found:
        yield found


def elements(page):
    return page.evaluate("document.querySelectorAll('*').length")


def shown_blocks(page):
    """By number, what the rows in the page say: share and text."""
    rows = page.evaluate(
        """[...document.querySelectorAll('.block')].map((row) => {
            const [share, words] = ['.share', '.words'].map((part) => row.querySelector(part).textContent);
            return [Number(row.dataset.index), share, words];
        })"""
    )
    return {index: (share, words) for index, share, words in rows}


def shares(trace, token=None, cell=None, block=None):
    """Shares by token, layer, head and block, (tokens, layers, heads, blocks), of what is asked for, on average over
    tokens and heads."""
    heads = 1 + max(entry["head"] for entry in trace.reads[0])
    layers = 1 + max(entry["layer"] for entry in trace.reads[0])
    found = np.zeros((len(trace.reads), layers, heads, len(trace.blocks)))
    for at, reads in enumerate(trace.reads):
        for entry in reads:
            found[at, entry["layer"], entry["head"], entry["block"]] = entry["share"]
    found = found if token is None else found[token : token + 1]
    return found if cell is None else found[:, cell[0] : cell[0] + 1, cell[1] : cell[1] + 1]


def percent(share):
    """A share as the page writes it."""
    if share == 0:
        return ""
    return "<0.01%" if share < 0.0001 else f"{100 * share:.{2 if share < 0.01 else 1 if share < 0.1 else 0}f}%"


def assert_shares(page, expected):
    rows = shown_blocks(page)
    assert len(rows) > 5
    for index, (share, _) in rows.items():
        # Packed and then rounded: half of the last digit and a little more.
        if not expected[index]:
            assert share == ""
        elif share != "<0.01%":
            digits = len(share.partition(".")[2].rstrip("%"))
            assert float(share.rstrip("%")) == pytest.approx(100 * expected[index], abs=0.51 * 10**-digits + 1e-3)
        else:
            assert expected[index] < 0.00011


def test_opened(page, long):
    trace, _ = long
    assert page.title() == "What did it read? a made-up model"
    about = page.locator("#about").inner_text()
    assert "prompt of 100,000 tokens" in about and f"{len(trace.blocks):,} blocks of 50" in about
    for index, (_, words) in shown_blocks(page).items():
        assert words == re.sub(r"\s*\n\s*", lambda m: " ¶ " if m[0].count("\n") > 1 else " ", trace.blocks[index])
    assert_shares(page, shares(trace).mean((0, 1, 2)))
    assert page.locator(".token").all_inner_texts()[:2] == [" 48", "213"]


def test_only_what_is_on_screen_is_there(page, long):
    trace, _ = long
    assert elements(page) < MOST_ELEMENTS
    height = page.evaluate("byId('blocks').scrollHeight")
    seen = set()
    for part in (0.1, 0.5, 0.503, 0.9, 1.0, 0.0):
        page.evaluate("(top) => { byId('blocks').scrollTop = top; }", part * height)
        # Two frames: one in which the list is told, one in which it is drawn.
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        rows = shown_blocks(page)
        first, last = page.evaluate(
            """[1, -1].map((inside) => {
                const box = byId('blocks').getBoundingClientRect();
                const y = inside > 0 ? box.top + 3 : box.bottom - 3;
                return Number(document.elementFromPoint(box.left + 300, y).closest('.block').dataset.index);
            })"""
        )
        assert set(range(first, last + 1)) <= rows.keys() and len(rows) < 40
        assert elements(page) < MOST_ELEMENTS
        seen |= rows.keys()
    assert {0, len(trace.blocks) - 1} <= seen and len(seen) < 0.1 * len(trace.blocks)


def test_a_long_answer_and_many_heads_are_not_there_at_once(browser, tmp_path):
    write_trace(tmp_path / "trace.html", made_trace(3000, 3000, layers=60, heads=4, top_k=1))
    with opened(browser, tmp_path / "trace.html", viewport=WIDE) as page:
        assert elements(page) < MOST_ELEMENTS
        page.locator("#tokens").focus()
        page.keyboard.press("End")
        assert page.locator('.token[aria-selected="true"]').get_attribute("aria-posinset") == "3000"
        page.locator("#heads").focus()
        for _ in range(8):
            page.keyboard.press("PageDown")
        assert page.locator('.cell[aria-selected="true"]').get_attribute("title").startswith("Layer 59, head 0")
        assert elements(page) < MOST_ELEMENTS


def test_a_token_a_head_and_a_block_are_chosen(page, long):
    trace, _ = long
    hidden = novel_blocks(100_000, 50)[2]
    page.locator("#token-1").click()
    by_block = shares(trace, token=1).mean((0, 1, 2))
    assert page.locator("#most button").first.get_attribute("aria-label").startswith(f"Block {hidden}, ")
    page.locator("#most button").first.click()
    assert hidden in shown_blocks(page)
    assert_shares(page, by_block)
    assert "token 2, “213”" in page.locator("#shown").inner_text()
    # All of the open block is there as it was written, and where it stands.
    chosen = page.locator('.block[aria-selected="true"]')
    assert chosen.locator(".words").text_content() == trace.blocks[hidden] and "48213" in trace.blocks[hidden]
    assert chosen.locator(".place").inner_text() == f"tokens {hidden * 50:,} to {hidden * 50 + 49:,}"
    # Heads and tokens say what they read of it.
    of_block = shares(trace)[..., hidden]
    for layer, head in ((4, 0), (5, 3), (11, 11)):
        said = page.locator(f"#cell-{layer * 12 + head}").get_attribute("title")
        assert said == f"Layer {layer}, head {head}: {percent(of_block[1, layer, head]) or '0%'}"
    assert page.locator("#token-5").get_attribute("title") == f"Token 6: {percent(of_block[5].mean()) or '0%'}"
    layer, head = (int(at) for at in np.unravel_index(of_block[1].argmax(), of_block[1].shape))
    page.locator(f"#cell-{layer * 12 + head}").click()
    assert_shares(page, shares(trace, token=1, cell=(layer, head)).mean((0, 1, 2)))
    assert f"layer {layer}, head {head}" in page.locator("#shown").inner_text()
    page.locator("#clear").click()
    assert page.locator("#shown").inner_text().startswith("Read by the whole answer:")
    assert_shares(page, shares(trace).mean((0, 1, 2)))
    assert page.locator('[aria-selected="true"]').count() == 0


def test_by_keyboard_alone(page, long):
    trace, _ = long

    def focused():
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    stops = []
    for _ in range(14):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.localName"))
    assert stops[:6] == ["query", "previous", "next", "theme", "blocks", "tokens"]
    assert {"heads", "summary"} <= set(stops)
    page.locator("#tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator('.token[aria-selected="true"]').get_attribute("id") == "token-1"
    assert page.locator("#tokens").get_attribute("aria-activedescendant") == "token-1"
    page.keyboard.press("Shift+Tab")
    assert focused() in ("blocks", "clear")
    page.locator("#blocks").focus()
    page.keyboard.press("End")
    last = len(trace.blocks) - 1
    assert page.locator("#blocks").get_attribute("aria-activedescendant") == f"block-{last}"
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    chosen = page.locator('.block[aria-selected="true"]')
    assert int(chosen.get_attribute("data-index")) < last - 2 and chosen.is_visible()
    # The chosen row stays for who reads the page by ear, wherever it is scrolled to.
    page.evaluate("byId('blocks').scrollTop = 0")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert chosen.count() == 1
    page.locator("#heads").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.locator('.cell[aria-selected="true"]').get_attribute("title").startswith("Layer 1, head 1")
    page.keyboard.press("Escape")
    assert page.locator('[aria-selected="true"]').count() == 0


def test_search(page, long):
    trace, _ = long
    text = "".join(trace.blocks)
    starts = np.cumsum([0, *map(len, trace.blocks)])
    places = [match.start() for match in re.finditer(r"captain\s+wentworth", text, re.IGNORECASE)]
    page.keyboard.press("Control+f")
    page.keyboard.type("captain wentworth")
    assert page.locator("#found").inner_text() == f"{len(places)} found"
    for turn in range(3):
        page.keyboard.press("Enter")
        assert page.locator("#found").inner_text() == f"{turn + 1} of {len(places)} found"
        chosen = page.locator('.block[aria-selected="true"]')
        assert int(chosen.get_attribute("data-index")) == np.searchsorted(starts, places[turn], side="right") - 1
        marked = "".join(page.locator("mark.current").all_text_contents())
        assert marked.split() and re.fullmatch(r"captain\s+wentworth", marked, re.IGNORECASE)
        assert page.locator("mark.current").first.is_visible()
    page.keyboard.press("Shift+Enter")
    assert page.locator("#found").inner_text() == f"2 of {len(places)} found"
    # One that begins in a block and ends in the next is found, and marked in both.
    split = next(
        i for i in range(100, 1000) if re.fullmatch(r"[a-z]{6,}", trace.blocks[i][-6:] + trace.blocks[i + 1][:1])
    )
    page.locator("#query").fill(trace.blocks[split][-12:] + trace.blocks[split + 1][:12])
    page.keyboard.press("Enter")
    assert page.locator(f"#block-{split} mark").count() == page.locator(f"#block-{split + 1} mark").count() == 1
    for nothing in ("(not [in] it*", "\\", "$"):
        page.locator("#query").fill(nothing)
        assert page.locator("#found").inner_text() == (
            "not found" if nothing not in text else f"{text.count(nothing)} found"
        )
    page.locator("#query").fill("")
    assert page.locator("mark").count() == 0 and page.locator("#found").inner_text() == ""


def test_text_that_looks_like_markup_is_text(browser, tmp_path):
    trace = trace_with([text for text in AWKWARD if text != "\udcff"], prompt_tokens=60)
    write_trace(tmp_path / "trace.html", trace)
    with opened(browser, tmp_path / "trace.html", viewport=WIDE) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a script of the prompt ran: {dialog.message}"))
        assert page.locator("script").count() == 2 and page.locator("style").count() == 1
        assert page.locator("img").count() == 0
        assert page.evaluate("JSON.parse(byId('trace').textContent).blocks") == list(trace.blocks)
        for index, text in enumerate(trace.blocks):
            page.locator(f"#block-{index} .number").click()
            assert page.locator(f"#block-{index} .words").text_content() == text
        assert page.locator("#about").text_content().startswith(trace.model)
        page.locator("#query").fill("<script>alert(1)")
        page.keyboard.press("Enter")
        assert page.locator("mark.current").text_content() == "<script>alert(1)"


def test_the_policy_is_in_force(browser, long):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(long[1].as_uri())
        refused = page.evaluate(
            """async () => {
                const refused = [];
                document.addEventListener('securitypolicyviolation', (event) => refused.push(event.effectiveDirective));
                const tried = async (work) => { try { await work(); } catch (error) { refused.push(error.name); } };
                const script = document.createElement('script');
                await tried(() => { document.body.innerHTML = '<b>x</b>'; });
                await tried(() => { script.text = 'window.ran = true'; document.body.append(script); });
                await tried(() => fetch('https://example.invalid/'));
                const image = new Image();
                image.src = 'https://example.invalid/x.png';
                document.body.setAttribute('style', 'color: red');
                await new Promise((done) => setTimeout(done, 200));
                return [...refused, String(window.ran), document.querySelectorAll('header').length];
            }"""
        )
    assert refused[-2:] == ["undefined", 1]
    assert {"TypeError", "require-trusted-types-for", "connect-src", "img-src", "style-src-attr"} <= set(refused[:-2])


def test_what_a_screen_reader_is_told(page, long):
    trace, _ = long
    hidden = novel_blocks(100_000, 50)[2]
    assert page.get_by_role("searchbox", name="Search the text").count() == 1
    assert page.get_by_role("listbox", name="The text, in blocks").count() == 1
    assert page.get_by_role("listbox", name="The answer, token by token").count() == 1
    assert page.get_by_role("grid", name="Layers and heads").count() == 1
    for name in ("Previous match", "Next match"):
        assert page.get_by_role("button", name=name).count() == 1
    page.get_by_role("option", name="Token 1, “ 48”", exact=False).click()
    page.get_by_role("button", name=f"Block {hidden}, ", exact=False).click()
    option = page.get_by_role(
        "option", name=re.compile(rf"Block {hidden}, read [\d.]+%, tokens [\d,]+ to [\d,]+: .*48213", re.S)
    )
    assert option.get_attribute("aria-posinset") == str(hidden + 1)
    assert option.get_attribute("aria-setsize") == str(len(trace.blocks))
    assert page.get_by_role("row").count() == 12 and page.get_by_role("gridcell").count() == 144
    assert page.get_by_role("gridcell", name="Layer 3, head 5: ").count() == 1
    assert page.locator("#shown[role=status]").inner_text().startswith("Read by token 1, “ 48”")
    # Whatever can be acted on has a name, whether it is in the page now or not.
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, [role=option], [role=gridcell], [tabindex]')].filter((one) =>
            !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


LUMINANCES = """(classes) => {
    const canvas = document.createElement('canvas');
    const context = canvas.getContext('2d', {willReadFrequently: true});
    const luminance = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => {
            c /= 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return classes.map((name) => {
        const row = document.querySelector('.block').cloneNode(true);
        row.className = `block ${name}`;
        byId('blocks').append(row);
        const parts = ['.words', '.number', '.share'].map((part) => row.querySelector(part));
        const found = parts.map((part) => luminance(getComputedStyle(part).color));
        found.push(luminance(getComputedStyle(row).backgroundColor));
        row.remove();
        return found;
    });
}"""


def contrast(one, other):
    """WCAG 2's ratio of two luminances."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_step_and_the_steps_are_steps_of_lightness(browser, long, scheme):
    with opened(browser, long[1], viewport=WIDE, color_scheme=scheme) as page:
        found = page.evaluate(LUMINANCES, RAMP)
    for *texts, ground in found:
        assert all(contrast(text, ground) >= 4.5 for text in texts), (texts, ground)
    # Without colour vision the ramp is one of greys: of CIE's lightness, always the same way and in like steps.
    lightness = np.array([116 * np.cbrt(ground) - 16 for *_, ground in found])
    steps = np.diff(lightness)[1:]
    assert (np.sign(steps) == (-1 if scheme == "light" else 1)).all()
    assert abs(steps).min() > 0.6 * abs(steps).max() > 1


def test_light_dark_and_as_the_system_is(browser, long):
    def ground(page):
        return page.evaluate(LUMINANCES, ["s0"])[0][-1]

    with opened(browser, long[1], viewport=WIDE, color_scheme="dark") as page:
        assert ground(page) < 0.1
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: light" and ground(page) > 0.9
        page.emulate_media(color_scheme="light")
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: dark" and ground(page) < 0.1
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: system" and ground(page) > 0.9


def test_what_colour_says_bars_and_numbers_say_too(page, long):
    page.locator("#token-1").click()
    page.locator("#most button").first.click()
    said = page.evaluate(
        """[['.block', '.bar', 'width'], ['.cell', 'i', 'height']].map(([one, bar, side]) =>
            [...document.querySelectorAll(one)].map((each) => {
                const found = each.querySelector(bar);
                const step = Number(each.className.match(/ s(\\d)/)[1]);
                return [step, found ? found.getBoundingClientRect()[side] : 0];
            }))"""
    )
    for pairs in said:
        assert {step > 0 for step, _ in pairs} == {True, False}
        assert all((step > 0) == (size > 0) for step, size in pairs)
        by_step = [size for _, size in sorted(pairs)]
        assert max(by_step) == by_step[-1]
    underlines = page.evaluate(
        """[...document.querySelectorAll('.token')].map((one) =>
            [one.className.includes(' s0'), parseFloat(getComputedStyle(one).borderBottomWidth)])"""
    )
    assert all(none == (width == 0) for none, width in underlines) and {none for none, _ in underlines} == {True, False}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (4, ["read earlier", "begins in what was read earlier", "", "its end was generated"]),
        (8, ["read earlier", "begins in what was read earlier", "", "its end was generated", "generated"]),
        (3, ["read earlier", "begins in what was read earlier", "", "its end was generated, not complete"]),
    ],
    ids=["a whole block", "two", "a part of one"],
)
def test_a_block_says_where_its_text_comes_from(browser, tmp_path, tokens, expected):
    blocks = [f"block {index}" for index in range(len(expected))]
    texts, reads = ["x"] * tokens, [[]] * tokens
    # Six tokens were read earlier, the prompt has seven, and the last token that was generated was not read.
    trace = trace_with(blocks, tokens=texts, reads=reads, memory_tokens=6, prompt_tokens=7)
    write_trace(tmp_path / "trace.html", trace)
    with opened(browser, tmp_path / "trace.html", viewport=WIDE) as page:
        said = page.locator(".block").evaluate_all("(all) => all.map((one) => one.title)")
    assert len(said) == len(expected)
    for index, (place, origin) in enumerate(zip(said, expected, strict=True)):
        end = min(4 * index + 4, 12 + tokens)
        assert re.match(rf"tokens {4 * index} to {end - 1}( \({origin})?", place) and ("(" in place) == bool(origin), (
            place
        )
        assert origin in place


@pytest.mark.parametrize("width", [360, 700, 1000, 1600])
def test_no_width_is_too_narrow(browser, long, width):
    with opened(browser, long[1], viewport={"width": width, "height": 740}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#token-1").click()
        page.locator("#most button").first.click()
        assert page.locator('.block[aria-selected="true"]').is_visible()
        box = page.locator('.block[aria-selected="true"]').bounding_box()
        assert 0 <= box["y"] < 740 and box["width"] > 0.5 * min(width, 700)


def test_what_a_small_model_read(browser, tmp_path):
    """A trace as it comes, from the model to the page."""
    from landmark_cli.inference.block_reader import BlockReader
    from landmark_cli.inference.generation import generate
    from landmark_cli.inference.settings import SamplingSettings
    from landmark_cli.inference.trace import trace_of
    from tests.awkward_tokenizers import byte_ids, byte_tokenizer
    from tests.tiny import tiny_model

    model, tokenizer = tiny_model(vocab_size=300, landmark_token_id=299), byte_tokenizer()
    reader = BlockReader(model, top_k_blocks=2)
    prompt, sampling = byte_ids("It was the best of times. " * 20), SamplingSettings(max_new_tokens=5, temperature=0.0)
    (result,) = generate(model, tokenizer, [prompt], sampling, reader=reader, trace=True)
    trace = trace_of("runs/a-model", reader, tokenizer, result)
    write_trace(tmp_path / "trace.html", trace)
    with opened(browser, tmp_path / "trace.html", viewport=WIDE) as page:
        page.locator("#token-3").click()
        read = {entry["block"] for entry in trace.reads[3]}
        said = page.locator("#most button").evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))")
        assert {int(re.match(r"Block (\d+)", label)[1]) for label in said} <= read and said
        assert page.evaluate("JSON.parse(byId('trace').textContent).tokens") == json.loads(json.dumps(trace.tokens))


def test_the_pictures_of_the_docs_are_taken(browser, long, tmp_path):
    load_script(ROOT / "docs" / "trace.py").take(browser, long[1], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs").glob("trace-*.png")}
    assert all(20_000 < path.stat().st_size < 150_000 for path in tmp_path.iterdir())


def test_nothing_generated_and_nothing_read(browser, tmp_path):
    write_trace(tmp_path / "trace.html", trace_with(["a prompt"], tokens=[], reads=[]))
    with opened(browser, tmp_path / "trace.html", viewport=WIDE) as page:
        assert page.locator("#tokens").inner_text().strip() == "Nothing was generated."
        assert page.locator("#most").inner_text().strip() == "No block was read."
        assert "No block was read" in page.locator("#head").inner_text()
        assert shown_blocks(page) == {0: ("", "a prompt")}
