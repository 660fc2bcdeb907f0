//go:build browser

// The page in a real browser: Chromium without a window, driven through its debugging pipe. The build tag "browser" keeps these
// tests out of "go test", since they need a browser: apt-get install chromium, then make browser. CHROMIUM names another binary.
package devrelay

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var pictures = flag.String("pictures", "", "write pictures of the page into this `folder`")

// A browser is a Chromium with one tab.
type browser struct {
	t       *testing.T
	in      *os.File
	session string
	id      int

	mu      sync.Mutex
	replies map[int]chan json.RawMessage
}

// openBrowser starts Chromium, with flags beside those that it needs.
func openBrowser(t *testing.T, flags ...string) *browser {
	t.Helper()
	name := os.Getenv("CHROMIUM")
	if name == "" {
		name = "chromium"
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, append([]string{"--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
		"--disable-background-networking", "--remote-debugging-pipe", "--user-data-dir=" + t.TempDir()}, flags...)...)
	cmd.ExtraFiles = []*os.File{theirIn, theirOut} // its descriptors 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: these tests need Chromium", err)
	}
	theirIn.Close()
	theirOut.Close()
	b := &browser{t: t, in: in, replies: map[int]chan json.RawMessage{}}
	read := make(chan struct{})
	go func() { // until the browser ends
		defer close(read)
		b.read(out)
	}()
	t.Cleanup(func() {
		b.session = ""
		b.send("Browser.close", nil)
		<-read
		cmd.Wait()
		in.Close()
		out.Close()
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	b.call("Page.enable", nil, nil)
	return b
}

func (b *browser) read(out *os.File) {
	r := bufio.NewReader(out)
	for {
		text, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID     int
			Result json.RawMessage
			Error  json.RawMessage
		}
		json.Unmarshal(text[:len(text)-1], &m)
		if m.ID == 0 {
			continue // an event
		}
		b.mu.Lock()
		c := b.replies[m.ID]
		delete(b.replies, m.ID)
		b.mu.Unlock()
		if m.Error != nil {
			m.Result = []byte(`{"failed":` + string(m.Error) + `}`)
		}
		c <- m.Result
	}
}

func (b *browser) send(method string, params any) chan json.RawMessage {
	c := make(chan json.RawMessage, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.id++
	b.replies[b.id] = c
	m := map[string]any{"id": b.id, "method": method}
	if params != nil {
		m["params"] = params
	}
	if b.session != "" {
		m["sessionId"] = b.session
	}
	text, _ := json.Marshal(m)
	b.in.Write(append(text, 0))
	return c
}

// call calls a method of the debugging protocol.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	select {
	case text := <-b.send(method, params):
		if strings.HasPrefix(string(text), `{"failed":`) {
			b.t.Fatalf("%s: %s", method, text)
		}
		if result != nil {
			if err := json.Unmarshal(text, result); err != nil {
				b.t.Fatalf("%s: %v", method, err)
			}
		}
	case <-time.After(30 * time.Second):
		b.t.Fatalf("%s: no answer", method)
	}
}

// eval evaluates an expression, or a promise of it, in the page and returns its value as JSON.
func (b *browser) eval(expression string) string {
	b.t.Helper()
	var r struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true}, &r)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, r.ExceptionDetails)
	}
	return string(r.Result.Value)
}

// until waits until an expression is true in the page.
func (b *browser) until(expression string) {
	b.t.Helper()
	got := b.eval(`new Promise(done => { const end = Date.now() + 15000; (function look() { let is = false; try { is = Boolean(` + expression + `) } catch {} ;
		is || Date.now() > end ? done(is) : setTimeout(look, 20) })() })`)
	if got != "true" {
		b.t.Fatalf("the page never has: %s\n%s", expression, b.eval("document.body.innerText.slice(0, 2000)"))
	}
}

// open goes to an address and waits until it is loaded.
func (b *browser) open(url string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.until(`document.readyState === "complete" && location.href !== "about:blank"`)
}

// key presses a key.
func (b *browser) key(key string) {
	b.t.Helper()
	code := map[string]int{"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39}[key]
	p := map[string]any{"type": "keyDown", "key": key, "windowsVirtualKeyCode": code}
	if len(key) == 1 {
		p["text"] = key
	}
	if key == "Enter" {
		p["text"] = "\r"
	}
	b.call("Input.dispatchKeyEvent", p, nil)
	b.call("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": key, "windowsVirtualKeyCode": code}, nil)
}

// look sets the size of the window and the colours that the user prefers.
func (b *browser) look(width, height int, scheme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

func (b *browser) picture(file string) {
	b.t.Helper()
	var r struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "optimizeForSpeed": false}, &r)
	octets, err := base64.StdEncoding.DecodeString(r.Data)
	if err == nil {
		err = os.WriteFile(file, octets, 0o644)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// A trap is an address at which nobody has any business. It counts who comes.
type trap struct {
	addr  string
	count atomic.Int64
	mu    sync.Mutex
	said  []string
}

func setTrap(t *testing.T) *trap {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	trap := &trap{addr: l.Addr().String()}
	go func() { // until the listener is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			trap.count.Add(1)
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(2 * time.Second))
				line, _ := bufio.NewReader(c).ReadString('\n')
				trap.mu.Lock()
				trap.said = append(trap.said, line)
				trap.mu.Unlock()
				fmt.Fprint(c, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
			}()
		}
	}()
	return trap
}

func TestAttackMailsReachNobodyAndLeaveThePageAlone(t *testing.T) {
	r := startRelay(t, nil)
	trap := setTrap(t)
	_, port, _ := net.SplitHostPort(trap.addr)
	// Any name leads to the trap, and so does a lookup that comes to a connection.
	b := openBrowser(t, "--host-resolver-rules=MAP *.example 127.0.0.1:"+port)

	// The trap works: a page of no policy that refers to it is heard of.
	b.open("data:text/html,<img src='http://" + trap.addr + "/control'>")
	waitFor(t, func() bool { return trap.count.Load() > 0 })
	trap.count.Store(0)
	trap.said = nil

	b.open(r.PageURL())
	b.until(`document.querySelector("#name").textContent !== ""`)
	b.eval(`window.untouched = true; window.addEventListener("message", () => { window.untouched = "a message came" })`)
	for _, a := range attacks(trap.addr) {
		id := deliver(t, r, a.mail())
		b.eval(`location.hash = "#/messages/` + id + `"`)
		b.until(`document.querySelector("#mail h2").textContent.length > 0 && document.querySelector("#mail").textContent.includes("` + id + `")`)
		if a.html != "" {
			b.until(frameLoaded(id))
			if got := b.eval(`document.querySelector("#mail iframe").getAttribute("sandbox")`); got != `""` {
				t.Errorf("%s: the frame's sandbox is %s", a.name, got)
			}
			clickIntoFrame(b) // a user who clicks where the attacker wants it
		}
		pause(b)
		title := b.eval(`document.title`)
		if got := b.eval(`window.untouched === true && location.origin`); got != `"`+strings.TrimSuffix(r.PageURL(), "/")+`"` || title != `"smtprelay serve"` {
			t.Errorf("%s: the page was touched: %s, title %s, at %s", a.name, got, title, b.eval("location.href"))
		}
		if n := trap.count.Swap(0); n != 0 {
			trap.mu.Lock()
			t.Errorf("%s: %d connections to the attacker: %q", a.name, n, trap.said)
			trap.said = nil
			trap.mu.Unlock()
		}
	}
	if n := len(r.faults.all()); n != 0 {
		t.Errorf("%d faults were set by mails", n)
	}
}

// frameLoaded is whether the HTML of a message is there.
func frameLoaded(id string) string {
	return `performance.getEntriesByType("resource").some(e => e.name.includes("/mail/` + id + `/html") && e.responseEnd > 0)`
}

// clickIntoFrame clicks at three places of the mail's frame: at the top, where a link or a button stands, and further down.
func clickIntoFrame(b *browser) {
	var box struct{ X, Y, W, H float64 }
	json.Unmarshal([]byte(b.eval(`(() => { const r = document.querySelector("#mail iframe").getBoundingClientRect(); return {x: r.x, y: r.y, w: r.width, h: r.height} })()`)), &box)
	for _, dy := range []float64{16, 40, box.H / 2} {
		for _, kind := range []string{"mousePressed", "mouseReleased"} {
			b.call("Input.dispatchMouseEvent", map[string]any{"type": kind, "x": box.X + 20, "y": box.Y + dy, "button": "left", "clickCount": 1}, nil)
		}
	}
}

// pause gives the browser time to do what it must not.
func pause(b *browser) { b.eval(`new Promise(done => setTimeout(done, 400))`) }

func waitFor(t *testing.T, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); {
		if time.Now().After(end) {
			t.Fatal("never")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestPageCanBeUsedByTheKeyboardAlone(t *testing.T) {
	r := startRelay(t, nil)
	for n := range 3 {
		deliver(t, r, fmt.Sprintf("Subject: mail %d\r\n\r\ntext %d\r\n", n, n))
	}
	b := openBrowser(t)
	b.open(r.PageURL())
	b.until(`document.querySelectorAll("#mails a").length === 3`)
	b.key("j")
	b.until(`document.querySelector("#mail h2").textContent === "mail 2"`)
	b.key("j")
	b.until(`document.querySelector("#mail h2").textContent === "mail 1"`)
	b.key("Escape")
	b.until(`location.hash === "#/messages"`)
	b.key("/")
	b.until(`document.activeElement.id === "q"`)
	for _, c := range "mail 0" {
		b.key(string(c))
	}
	b.until(`document.querySelectorAll("#mails a").length === 1`)
	b.key("Tab") // Delete all
	b.key("Tab") // the list
	b.until(`document.activeElement.matches("#mails a")`)
	b.key("Enter")
	b.until(`document.querySelector("#mail h2").textContent === "mail 0"`)
	b.key("4")
	b.until(`document.querySelectorAll("#presets button").length > 5`)
	b.eval(`document.querySelector("#f-reply").focus()`)
	for _, c := range "450 4.2.1 later" {
		b.key(string(c))
	}
	b.key("Enter")
	b.until(`document.querySelector("#faults code").textContent === "rcpt=450 4.2.1 later"`)
	b.eval(`document.querySelector("#faults [role=switch]").focus()`)
	b.key("Enter")
	b.until(`document.querySelector("#faults [role=switch]").getAttribute("aria-checked") === "false" && document.activeElement.id === "switch-1"`)
	if f := r.faults.all(); len(f) != 1 || f[0].On {
		t.Errorf("faults %+v", f)
	}
}

func TestDialogueIsShownWhileItHappens(t *testing.T) {
	r := startRelay(t, nil)
	b := openBrowser(t)
	b.open(r.PageURL() + "#/connections/1")
	c := dialRaw(t, r)
	c.say("EHLO client.test")
	b.until(`document.querySelector("#conns a")`)
	b.eval(`location.hash = "#/connections"; location.hash = "#/connections/1"`)
	b.until(`document.querySelector("#lines").textContent.includes("EHLO client.test")`)
	c.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>")
	b.until(`document.querySelector("#lines").textContent.includes("b@y.example")`)
	c.say("FOO")
	b.until(`document.querySelector("#lines .refusal").textContent.includes("500 ")`)
	b.until(`[...document.querySelectorAll("#lines .turn")].at(-1).textContent === "turn 3"`)
	if b.eval(`document.documentElement.scrollWidth <= innerWidth`) != "true" {
		t.Error("the page is wider than the window")
	}
}

func TestPageFitsAPhone(t *testing.T) {
	r := startRelay(t, nil)
	fillForPictures(t, r)
	b := openBrowser(t)
	b.look(390, 844, "light")
	b.open(r.PageURL())
	id := r.mails.page(mailFilter{text: "rechnung"}, 0, 1).Messages[0].ID
	for _, hash := range []string{"#/messages", "#/messages/" + id, "#/connections", "#/connections/1", "#/refusals", "#/faults"} {
		b.eval(`location.hash = "` + hash + `"`)
		pause(b)
		if b.eval(`document.documentElement.scrollWidth <= 390`) != "true" {
			t.Errorf("%s: %s pixels wide", hash, b.eval(`document.documentElement.scrollWidth`))
		}
	}
}

func TestPageAsksForWhatIsNewAlone(t *testing.T) {
	r := startRelay(t, nil)
	for n := range 10_000 {
		r.mails.add(numbered(n))
	}
	b := openBrowser(t)
	b.open(r.PageURL())
	b.until(`document.querySelectorAll("#mails a").length === 50 && document.querySelector("#found").textContent.includes("10,000")`)
	asked := `performance.getEntriesByType("resource").filter(e => e.name.includes("/messages?")).map(e => new URL(e.name).search)`
	if got := b.eval(asked); got != `["?limit=50"]` {
		t.Errorf("to begin with the page asks for %s", got)
	}
	r.mails.add(numbered(10_000)) // and the oldest goes
	b.until(`document.querySelector("#mails .strong").textContent === "Your order 10000"`)
	b.eval(`document.querySelector("#more").click()`)
	b.until(`document.querySelectorAll("#mails a").length >= 100`)
	if got := b.eval(asked); got != `["?limit=50","?after=10000&limit=100","?before=9951&limit=50"]` {
		t.Errorf("after one message, and for older ones, the page asks for %s", got)
	}
	t.Log(b.eval(`performance.getEntriesByType("resource").filter(e => e.name.includes("/messages?")).map(e => Math.round(e.duration) + " ms")`))
	b.eval(`document.querySelector("#q").value = "user7777"; document.querySelector("#q").dispatchEvent(new Event("input"))`)
	b.until(`document.querySelectorAll("#mails a").length === 1`)
}

// TestPictures writes the pictures of docs/pictures, if -pictures says where to.
func TestPictures(t *testing.T) {
	if *pictures == "" {
		return
	}
	r := startRelay(t, func(c *Config) { c.Delay = 20 * time.Millisecond })
	fillForPictures(t, r)
	b := openBrowser(t)
	id := r.mails.page(mailFilter{text: "rechnung"}, 0, 1).Messages[0].ID
	for _, p := range []struct {
		name, hash, scheme string
		width, height      int
	}{
		{"serve-message", "#/messages/" + id, "light", 1180, 800},
		{"serve-dialogue", "#/connections/1", "light", 1180, 800},
		{"serve-dialogue-dark", "#/connections/1", "dark", 1180, 800},
		{"serve-faults-dark", "#/faults", "dark", 1180, 800},
		{"serve-phone-message", "#/messages/" + id, "dark", 390, 844},
		{"serve-phone-dialogue", "#/connections/1", "light", 390, 844},
	} {
		b.look(p.width, p.height, p.scheme)
		b.open(r.PageURL())
		b.eval(`location.hash = "` + p.hash + `"`)
		if strings.HasSuffix(p.hash, id) {
			b.until(frameLoaded(id))
			pause(b)
			pause(b)
			pause(b)
		}
		pause(b)
		b.eval(`document.querySelector(".lines")?.scrollTo(0, 0)`)
		pause(b)
		b.picture(filepath.Join(*pictures, p.name+".png"))
	}
}

// fillForPictures gives the relay what a page is to show: mails, refusals and faults.
func fillForPictures(t testing.TB, r *Relay) {
	t.Helper()
	for _, text := range []string{"rcpt=550 5.1.1 no such user; rcpt=bob@example.org", "dot=451 4.7.1 try again later; nth=4; count=1", "mail=delay=40ms; every=3"} {
		f, err := ParseFault(text)
		if err != nil {
			t.Fatal(err)
		}
		r.faults.add(f)
	}
	r.faults.turn(3, false)
	c := dialRaw(t, r)
	for n := range 3 {
		c.deliver(fmt.Sprintf("From: Shop <shop@example.com>\r\nTo: ann@example.org\r\nSubject: Your order %d is on its way\r\n\r\nHello Ann,\r\n\r\nyour order has left our warehouse.\r\n", 1001+n))
	}
	c.say("MAIL FROM:<shop@example.com>", "RCPT TO:<ann@example.org>", "RCPT TO:<bob@example.org>", "DATA")
	c.say("Subject: later\r\n\r\nx\r\n.")
	c.say("QUIT")
	const page = `<body style="margin:0;background:#f4f1ea;font-family:sans-serif"><div style="max-width:480px;margin:24px auto;background:#fff;padding:24px;border-radius:10px">
<img src="cid:logo@shop" width="120" height="40" alt="Shop"><h1 style="color:#b5482a;font-size:22px">Thank you, Ann!</h1><p>Your order <b>1004</b> has left our warehouse.</p>
<table width="100%"><tr><td>Lamp</td><td align="right">39.00</td></tr><tr><td>Bulb, 3 pieces</td><td align="right">12.00</td></tr></table>
<p><a href="https://shop.example.com/track">Where is it?</a></p><img src="https://track.example/pixel.gif" alt=""></div></body>`
	const logo = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 120 40"><rect width="120" height="40" rx="6" fill="#b5482a"/><text x="26" y="27" fill="#fff" font-size="22" font-family="sans-serif">SHOP</text></svg>`
	deliver(t, r, "From: Shop <shop@example.com>\r\nTo: Ann <ann@example.org>\r\nSubject: =?utf-8?Q?Ihre_Rechnung_f=C3=BCr_M=C3=A4rz?=\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=m\r\n\r\n"+
		"--m\r\nContent-Type: multipart/alternative; boundary=a\r\n\r\n--a\r\nContent-Type: text/plain\r\n\r\nThank you, Ann!\r\n--a\r\nContent-Type: multipart/related; boundary=r\r\n\r\n"+
		"--r\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"+page+"\r\n--r\r\nContent-Type: image/svg+xml\r\nContent-Id: <logo@shop>\r\n\r\n"+logo+"\r\n--r--\r\n--a--\r\n"+
		"--m\r\nContent-Type: application/pdf\r\nContent-Disposition: attachment; filename*=utf-8''Rechnung%20M%C3%A4rz.pdf\r\n\r\n%PDF-1.4 "+strings.Repeat("x", 4000)+"\r\n--m--\r\n")
}
