"""Chromium, told what to do through two pipes: no port, no package.

`with Browser() as browser: page = browser.open(file, width)`, then `page.value("document.title")`."""
import base64, fcntl, json, os, shutil, subprocess, tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")

def find_browser():
    "The path of a chromium, or None."
    return next((path for name in NAMES if (path := shutil.which(name))), None)

class Browser:
    "A headless chromium; it speaks the DevTools protocol: JSON messages that end in a zero byte."
    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        their_end, self.to = os.pipe()
        self.back, their_other_end = os.pipe()
        def take_ends():
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_end, their_other_end)]
            for number, end in zip((3, 4), ends): os.dup2(end, number)     # where chromium looks for them
        command = [find_browser(), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=take_ends, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(their_end)
        os.close(their_other_end)
        self.messages, self.rest, self.number = [], b"", 0
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def next_message(self):
        "Wait for a message."
        while b"\0" not in self.rest:
            part = os.read(self.back, 1 << 20)
            if not part: raise RuntimeError("the browser has ended")
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def ask(self, method, session=None, **parameters):
        "Call a method, and return its result; events that come first are kept in `messages`."
        self.number += 1
        request = dict(id=self.number, method=method, params=parameters)
        if session: request["sessionId"] = session
        os.write(self.to, json.dumps(request).encode() + b"\0")
        while (message := self.next_message()).get("id") != self.number: self.messages.append(message)
        if "error" in message: raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, file, width, height=900, phone=False, dark=False):
        "A page that has loaded, in a window of this size."
        return Page(self, Path(file).resolve().as_uri(), width, height, phone, dark)

class Page:
    "A page in the browser."
    def __init__(self, browser, url, width, height, phone, dark):
        self.browser = browser
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.ask(f"{domain}.enable")
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        while not self.events("Page.loadEventFired"): browser.messages.append(browser.next_message())

    def ask(self, method, **parameters): return self.browser.ask(method, self.session, **parameters)

    def events(self, method):
        "What the page has said of this kind."
        own = [m for m in self.browser.messages if m.get("sessionId") == self.session]
        return [m["params"] for m in own if m["method"] == method]

    def value(self, expression):
        "The value of an expression in JavaScript."
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result: raise RuntimeError(result["exceptionDetails"]["text"])
        return result["result"].get("value")

    def complaints(self):
        "Errors and warnings of the console, and exceptions."
        self.value("0")      # so that whatever was said before has arrived
        said = [p["entry"]["text"] for p in self.events("Log.entryAdded")]
        said += [str(p["args"]) for p in self.events("Runtime.consoleAPICalled")]
        return said + [p["exceptionDetails"]["text"] for p in self.events("Runtime.exceptionThrown")]

    def requests(self):
        "The addresses that were asked for, without data inside the page."
        urls = [p["request"]["url"] for p in self.events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, whole=False):
        "A PNG of the window, or of the whole page."
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
