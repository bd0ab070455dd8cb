"""A real Chromium, driven by real keys and clicks over its DevTools pipe."""
import base64
import fcntl
import json
import os
import select
import signal
import subprocess
from time import monotonic, sleep  # which tests may have replaced in their module

FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--remote-debugging-pipe']
# Name -> code of the key (Windows' virtual ones, as DevTools wants them) and the text that it types.
KEYS = dict(Tab=(9, ''), Enter=(13, '\r'), Space=(32, ' '), End=(35, ''), Home=(36, ''), ArrowLeft=(37, ''),
            ArrowUp=(38, ''), ArrowRight=(39, ''), ArrowDown=(40, ''))


class Browser:
    """One page at a time; `complaints` collects what the console says.

    Args:
        folder (Path): For the profile.
    """

    def __init__(self, folder):
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in self._pipes()]
        theirs = (ends[0], ends[3])
        self._write, self._read = ends[1], ends[2]
        script = f'exec chromium "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ['bash', '-c', script, 'chromium', *FLAGS, f'--user-data-dir={folder}', 'about:blank'], pass_fds=theirs,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for end in theirs:
            os.close(end)
        self._buffer, self._count, self._session = b'', 0, None
        self.complaints, self.requests = [], []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    @staticmethod
    def _pipes():
        pipes = [*os.pipe(), *os.pipe()]
        for end in pipes:
            yield end
            os.close(end)

    def call(self, method, **params):
        """A command of the DevTools protocol, and its result."""
        self._count += 1
        session = {} if self._session is None else dict(sessionId=self._session)
        message = dict(id=self._count, method=method, params=params, **session)
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            message = self._receive()
            if message.get('id') == self._count:
                assert 'error' not in message, message
                return message['result']

    def _receive(self, seconds=60):
        deadline = monotonic() + seconds
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - monotonic(), 0))
            assert ready, f'chromium says nothing for {seconds} s'
            part = os.read(self._read, 2**20)
            assert part, 'chromium has ended'
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b'\0')
        message = json.loads(line)
        if message.get('method') == 'Runtime.exceptionThrown':
            self.complaints.append(message['params']['exceptionDetails'])
        elif message.get('method') in ('Runtime.consoleAPICalled', 'Log.entryAdded'):
            self.complaints.append(message['params'])
        elif message.get('method') == 'Network.requestWillBeSent':
            self.requests.append(message['params']['request']['url'])
        return message

    def open(self, path):
        """Loads a file, all of it."""
        self.requests.clear()
        self.call('Page.navigate', url=path.as_uri())
        self.wait_for('document.readyState === "complete"')

    def value(self, expression):
        """The value of an expression in the page, plain data."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def wait_for(self, expression, seconds=30):
        """Waits until an expression is true; one that fails, in a page that loads, is not."""
        deadline = monotonic() + seconds
        while self.call('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value') is not (
                True):
            assert monotonic() < deadline, f'{expression} did not come true'
            sleep(0.02)

    def press(self, *names):
        """Presses keys, one after the other."""
        for name in names:
            code, text = KEYS[name]
            key = dict(key=text or name, code=name, windowsVirtualKeyCode=code)
            self.call('Input.dispatchKeyEvent', type='keyDown' if text else 'rawKeyDown', **key,
                      **(dict(text=text) if text else {}))
            self.call('Input.dispatchKeyEvent', type='keyUp', **key)

    def click(self, expression, where=0.5):
        """Clicks an element, so far from its left end."""
        x, y = self.value(f'(node => {{ node.scrollIntoView({{block: "center"}}); const box = '
                          f'node.getBoundingClientRect(); return [box.left + {where} * box.width, '
                          f'box.top + box.height / 2]; }})({expression})')
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def move_to(self, expression, where):
        """Moves the pointer over an element, so far from its left end."""
        x, y = self.value(f'(box => [box.left + {where} * box.width, box.top + box.height / 2])'
                          f'({expression}.getBoundingClientRect())')
        self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

    def window(self, width, height, dark=False):
        """Sets the size of the window, and whether the reader prefers dark colours."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setEmulatedMedia', features=[
            dict(name='prefers-color-scheme', value='dark' if dark else 'light')])

    def picture(self):
        """What is seen, a PNG."""
        return base64.b64decode(self.call('Page.captureScreenshot')['data'])

    def close(self):
        """Ends it."""
        os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
        self.process.wait()
        for end in (self._read, self._write):
            os.close(end)
