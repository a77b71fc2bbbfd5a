"""Headless Chromium over its DevTools protocol: enough to open a page, run JavaScript in it, and see what it logged and asked for."""
import itertools, json, os, shutil, subprocess, tempfile, time
from pathlib import Path
import websocket

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'

def executable():
    "Path of a Chromium, or None."
    return os.environ.get('CHROMIUM') or next((p for p in map(shutil.which, NAMES) if p), None)

class Browser:
    "One page of a headless Chromium; use it in a `with` statement."
    def __init__(self, path):
        self.profile = tempfile.mkdtemp(prefix='chromium-')
        # no sandbox: tests run as root in containers; the pages are our own
        self.process = subprocess.Popen([path, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking',
            '--disable-component-update', '--remote-debugging-port=0', '--remote-allow-origins=*', f'--user-data-dir={self.profile}', 'about:blank'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.ids, self.events = itertools.count(1), []
        try: self.socket = self._connect()
        except BaseException: self.close(); raise
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.call(f'{domain}.enable')

    def _connect(self, seconds=60):
        "A socket to the first page; Chromium writes its port into the profile."
        import urllib.request
        said, end = Path(self.profile)/'DevToolsActivePort', time.time() + seconds
        while time.time() < end:
            if self.process.poll() is not None: raise RuntimeError(f'chromium ended with status {self.process.returncode}')
            if said.exists() and len(lines := said.read_text().split()) == 2:
                pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{lines[0]}/json'))
                for page in pages:
                    if page['type'] == 'page': return websocket.create_connection(page['webSocketDebuggerUrl'], timeout=60, suppress_origin=True)
            time.sleep(.1)
        raise TimeoutError('chromium did not start')

    def __enter__(self): return self
    def __exit__(self, *_): self.close()

    def close(self):
        if hasattr(self, 'socket'): self.socket.close()
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **params):
        "The result of a command; what happens meanwhile is kept in `events`."
        number = next(self.ids)
        self.socket.send(json.dumps({'id': number, 'method': method, 'params': params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get('id') == number:
                if 'error' in message: raise RuntimeError(f"{method}: {message['error']}")
                return message['result']
            self.events.append(message)

    def js(self, expression):
        "The value of a JavaScript expression; promises are waited for."
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in result: raise RuntimeError(result['exceptionDetails'].get('exception', {}).get('description', result['exceptionDetails']))
        return result['result'].get('value')

    def open(self, url, width=1280, height=900, dark=False):
        "Load a page and wait until its scripts and fonts are there."
        self.events.clear()
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])
        self.call('Page.navigate', url=url)
        while not any(e['method'] == 'Page.loadEventFired' for e in self.events): self.events.append(json.loads(self.socket.recv()))
        self.js('document.fonts.ready.then(() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50))))')

    def errors(self):
        "What the page complained about since it was opened."
        thrown = [e['params']['exceptionDetails'].get('exception', {}).get('description') or e['params']['exceptionDetails']['text'] for e in self.events if e['method'] == 'Runtime.exceptionThrown']
        console = [str(e['params']['args']) for e in self.events if e['method'] == 'Runtime.consoleAPICalled' and e['params']['type'] in ('error', 'assert')]
        logged = [f"{e['params']['entry']['text']} {e['params']['entry'].get('url', '')}" for e in self.events if e['method'] == 'Log.entryAdded' and e['params']['entry']['level'] == 'error']
        return thrown + console + logged

    def requests(self):
        "Every address that was asked for since the page was opened."
        return [e['params']['request']['url'] for e in self.events if e['method'] == 'Network.requestWillBeSent']

    def screenshot(self, path, whole=False):
        import base64
        data = self.call('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        Path(path).write_bytes(base64.b64decode(data))
