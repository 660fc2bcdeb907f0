// Attack mails: the headers of all that is served of them, and what is left of their HTML. browser_test.go opens them in a browser.
package devrelay

import (
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"regexp"
	"strings"
	"testing"

	nethtml "golang.org/x/net/html"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
)

func get(t *testing.T, r *Relay, path string) (*http.Response, string) {
	t.Helper()
	res, err := http.Get(web(r) + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// wantHeaders checks headers; "" means that there must be none.
func wantHeaders(t *testing.T, res *http.Response, want ...string) {
	t.Helper()
	want = append(want, "X-Content-Type-Options", "nosniff", "Referrer-Policy", "no-referrer", "Cross-Origin-Resource-Policy", "same-origin",
		"X-Dns-Prefetch-Control", "off", "Cache-Control", "no-store", "Access-Control-Allow-Origin", "", "X-Evil", "")
	for i := 0; i < len(want); i += 2 {
		if got := strings.Join(res.Header.Values(want[i]), "\n"); got != want[i+1] {
			t.Errorf("%s: %s is %q, want %q", res.Request.URL, want[i], got, want[i+1])
		}
	}
}

func TestAttackMailsAreServedHarmlessly(t *testing.T) {
	r := startRelay(t, nil)
	active := regexp.MustCompile(`(?i)<(script|link|meta|base|iframe|frame|object|embed|form|noscript|template|portal)\b`)
	leads := regexp.MustCompile(`(?i)<(a|area)\b[^>]*\bhref="?[^#"]`)
	for _, a := range attacks("evil.example") {
		t.Run(a.name, func(t *testing.T) {
			id := deliver(t, r, a.mail())
			res, page := get(t, r, "/mail/"+id+"/html")
			wantHeaders(t, res, "Content-Type", "text/html; charset=utf-8", "X-Frame-Options", "SAMEORIGIN",
				"Content-Security-Policy", "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'")
			if m := active.FindString(page); m != "" {
				t.Errorf("%s is left in %s", m, page)
			}
			if m := leads.FindString(page); m != "" {
				t.Errorf("a link leads somewhere: %s in %s", m, page)
			}
			res, _ = get(t, r, "/api/v1/messages/"+id+"/source")
			wantHeaders(t, res, "Content-Type", "text/plain; charset=utf-8", "Content-Security-Policy", guard.DataPolicy)
			res, _ = get(t, r, "/api/v1/messages/"+id)
			wantHeaders(t, res, "Content-Type", "application/json", "Content-Security-Policy", guard.DataPolicy)
			res, _ = get(t, r, "/api/v1/messages/"+id+"/source?download=1")
			wantHeaders(t, res, "Content-Type", "application/octet-stream", "Content-Disposition", `attachment; filename=`+id+`.eml`)
			for n := 1; ; n++ {
				res, _ := get(t, r, fmt.Sprintf("/api/v1/messages/%s/parts/%d", id, n))
				if res.StatusCode == 404 && n > 1 {
					break
				}
				wantHeaders(t, res, "Content-Type", "application/octet-stream", "Content-Security-Policy", guard.DataPolicy)
				if d := res.Header.Get("Content-Disposition"); !regexp.MustCompile(`^attachment; filename(=[A-Za-z0-9.-]+|=".*"|\*=utf-8''[A-Za-z0-9%._-]+)$`).MatchString(d) {
					t.Errorf("Content-Disposition: %s", d)
				}
			}
		})
	}
	res, _ := get(t, r, "/")
	wantHeaders(t, res, "X-Frame-Options", "DENY", "Content-Security-Policy", guard.PagePolicy, "Content-Type", "text/html; charset=utf-8", "Cross-Origin-Opener-Policy", "same-origin")
}

// The page's policy forbids scripts and styles in the page, so there must be none; nothing is loaded from elsewhere.
func TestPageHasNoInlineScriptAndNothingFromElsewhere(t *testing.T) {
	for _, name := range []string{"index.html", "login.html", "page.css", "page.js", "icon.svg"} {
		text, err := fs.ReadFile(pages, name)
		if err != nil {
			t.Fatal(err)
		}
		s := strings.ReplaceAll(string(text), `xmlns="http://www.w3.org/2000/svg"`, "")
		if m := regexp.MustCompile(`(?i)(src|href|url|import)\s*[=(]?\s*["']?(https?:)?//`).FindString(s); m != "" {
			t.Errorf("%s loads from elsewhere: %s", name, m)
		}
		if m := regexp.MustCompile(`(?i)innerHTML|insertAdjacent|document\.write|eval\(|new Function`).FindString(s); m != "" {
			t.Errorf("%s: %s", name, m)
		}
		if strings.HasSuffix(name, ".html") {
			if m := regexp.MustCompile(`(?i)<script>|<style|\sstyle=|\son[a-z]+=|javascript:`).FindString(s); m != "" {
				t.Errorf("%s has %s inline", name, m)
			}
		}
	}
}

func TestDisarmLeavesTheRestAsItIs(t *testing.T) {
	for in, want := range map[string]string{
		`<p style="color:red">a &amp; b < c</p>`:                              `<p style="color:red">a &amp; b < c</p>`,
		`<style>@media (width < 600px) { p > a { color: red } }</style>`:      `<style>@media (width < 600px) { p > a { color: red } }</style>`,
		`a<script>b</script>c`:                                                `a` + taken + taken + `c`,
		`<a class="x" href="http://x.example/?a=1&amp;b=2" target=_top>y</a>`: `<a class="x" href="#" title="http://x.example/?a=1&amp;b=2">y</a>`,
		`<a name=top>x</a>`:                                                   `<a name="top">x</a>`,
		`<a onclick='"><link>' x"="y" href=z>`:                                `<a onclick="&#34;&gt;&lt;link&gt;" href="#" title="z">`,
		`<<!-- -->link rel=preconnect>`:                                       `<` + taken + `link rel=preconnect>`,
		`<<base>link rel=preconnect>`:                                         `<` + taken + `link rel=preconnect>`,
	} {
		if got, _ := disarm(in); got != want {
			t.Errorf("%s\nbecomes %s\nwant    %s", in, got, want)
		}
	}
	_, links := disarm(`<a href=" https://a.example/ ">1</a><a href="https://a.example/">2</a><area href="mailto:x@y.example"><a>3</a>`)
	if fmt.Sprint(links) != "[https://a.example/ mailto:x@y.example]" {
		t.Errorf("links %q", links)
	}
}

// FuzzDisarm has a parser of whole documents, as browsers have one, look at what is left.
func FuzzDisarm(f *testing.F) {
	for _, a := range attacks("evil.example") {
		f.Add(a.html)
	}
	f.Fuzz(func(t *testing.T, in string) {
		out, _ := disarm(in)
		root, err := nethtml.ParseWithOptions(strings.NewReader(out), nethtml.ParseOptionEnableScripting(false))
		if err != nil {
			return // too deep
		}
		for n := range root.Descendants() {
			if n.Type != nethtml.ElementNode {
				continue
			}
			if disarmed[n.Data] {
				t.Fatalf("%q becomes %q, which has <%s>", in, out, n.Data)
			}
			for _, a := range n.Attr {
				if (n.Data == "a" || n.Data == "area") && (a.Key == "href" && a.Val != "#" || a.Key == "ping" || a.Namespace == "xlink") {
					t.Fatalf("%q becomes %q, which leads to %q", in, out, a.Val)
				}
			}
		}
	})
}

func TestImagesOfTheMessageAreShown(t *testing.T) {
	part := func(headers, body string) string { return "--b\r\n" + headers + "\r\n\r\n" + body + "\r\n" }
	mail := func(html string, parts ...string) []byte {
		return []byte("Content-Type: multipart/related; boundary=b\r\n\r\n" + part("Content-Type: text/html", html) + strings.Join(parts, "") + "--b--\r\n")
	}
	png := part("Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\nContent-ID: <a&b@x>", "iVBORw==")
	text := part("Content-Type: text/html\r\nContent-ID: <h@x>", "<script>")
	body := mail(`<img src="cid:a&amp;b@x"><img src='cid:h@x'><img src="cid:none"><img src='cid:a&amp;b@x'>`, png, text)
	got := withImages(parse(body, maxShown).HTML, body)
	if want := `<img src="data:image/png;base64,iVBORw=="><img src='cid:h@x'><img src="cid:none"><img src='data:image/png;base64,iVBORw=='>`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	body = mail(strings.Repeat(`<img src="cid:big">`, 1000), part("Content-Type: image/png\r\nContent-ID: <big>", strings.Repeat("x", 1<<20)))
	if got := withImages(parse(body, maxShown).HTML, body); len(got) > maxInline+1<<20 || !strings.Contains(got, "data:") {
		t.Errorf("one image a thousand times makes %d octets", len(got))
	}
}
