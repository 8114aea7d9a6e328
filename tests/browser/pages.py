"""What a user does on the page."""

from dataclasses import dataclass

from playwright.sync_api import Locator, Page, expect

from tests.scripted import Script


@dataclass(frozen=True)
class Chat:
    """The page, and what the model behind it says."""

    page: Page
    script: Script

    def send(self, text: str) -> None:
        """Write a message and send it."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def wait(self) -> None:
        """Until no answer comes any more and all is drawn."""
        self.page.wait_for_selector("#app:not(.answering)")
        expect(self.page.locator("[aria-busy]")).to_have_count(0)

    def ask(self, text: str, answer: str, reasoning: str = "") -> Locator:
        """Send a message and wait for its answer."""
        self.script.says(answer, reasoning)
        self.send(text)
        self.wait()
        return self.last

    @property
    def last(self) -> Locator:
        """The last answer."""
        return self.page.locator("#messages > li.assistant").last

    @property
    def messages(self) -> list[str]:
        """The texts of all messages that are shown."""
        bodies = self.page.locator("#messages > li > article > .body")
        return [text.strip() for text in bodies.all_inner_texts()]

    def conversations(self) -> list[str]:
        """The titles in the list."""
        return self.page.locator("#conversations .entry").all_inner_texts()
