// The page of an outbox: what its API shows and does, and who may use it. What the guard refuses in general is tested in internal/devrelay.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
	"github.com/smtprelay/smtprelay/outbox"
)

// servePage runs "smtprelay outbox page" until the test ends, and returns the address that it prints.
func (p *place) servePage(args ...string) string {
	p.Helper()
	p.Setenv("SMTPRELAY_OUTBOX", p.setting)
	ctx, stop := context.WithCancel(context.Background())
	out, w := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		var stderr strings.Builder
		code := run(ctx, append(words("smtprelay outbox page --http 127.0.0.1:0"), args...), nil, w, &stderr)
		w.CloseWithError(fmt.Errorf("it has ended: %s", &stderr))
		ended <- code
	}()
	p.Cleanup(func() {
		stop()
		http.DefaultClient.CloseIdleConnections()
		if code := <-ended; code != 0 {
			p.Errorf("exit status %d", code)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.Fatal(err)
	}
	go io.Copy(io.Discard, out) // until it ends
	return strings.TrimSpace(strings.TrimPrefix(line, "Page: "))
}

// ask sends a request and decodes the answer.
func ask(t *testing.T, method, url, body string, v any, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && v != nil {
		err = json.Unmarshal(text, v)
	}
	if err != nil {
		t.Errorf("%s %s: %v: %s", method, url, err, text)
	}
	return res
}

func TestOutboxPageShowsAndDecides(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("u", outbox.Unknown)
		p.put("d 1/&?", outbox.Dead, func(i *outbox.Item) {
			i.Fates = []outbox.Fate{{To: "ann@example.org", Outcome: smtprelay.NotAccepted, Code: 550, Reply: "550 no"}}
		})
		p.put("q1", outbox.Queued)
		p.put("q2", outbox.Queued)
		api := p.servePage() + "api/v1"
		var c counts
		if ask(p.T, "GET", api+"/counts", "", &c); c.Queued != 2 || c.Dead != 1 || c.Unknown != 1 {
			p.Errorf("got %+v", c)
		}
		type list struct {
			Messages []itemRecord
			More     string
		}
		get := func(query, want string) (l list) {
			p.Helper()
			ask(p.T, "GET", api+"/messages?"+query, "", &l)
			var ids []string
			for _, m := range l.Messages {
				ids = append(ids, m.ID)
			}
			if got := strings.Join(ids, ","); got != want {
				p.Errorf("%s: %s; want %s", query, got, want)
			}
			return l
		}
		all := get("", "u,d 1/&?,q1,q2")
		first := get("state=queued&limit=1", "q1")
		get("state=queued&after="+url.QueryEscape(first.More), "q2")
		get("to=@example.net", "")
		for _, query := range []string{"?stat=dead", "?limit=0", "?limit=9999", "?state=deaf", "?after=q1"} {
			if res := ask(p.T, "GET", api+"/messages"+query, "", nil); res.StatusCode != 400 {
				p.Errorf("%s: %s", query, res.Status)
			}
		}
		var m itemRecord
		ask(p.T, "GET", api+"/message?id="+url.QueryEscape("d 1/&?"), "", &m)
		if m.State != "dead" || m.Header == nil || !strings.HasPrefix(*m.Header, "Subject: d 1") || m.Recipients[0].Reply != "550 no" {
			p.Errorf("got %+v", m)
		}

		decide := func(m itemRecord, deed string, status int) {
			p.Helper()
			body, err := json.Marshal(map[string]any{"id": m.ID, "deed": deed, "changed": m.Changed})
			if err != nil {
				p.Fatal(err)
			}
			var answer struct{ State, Error string }
			if res := ask(p.T, "POST", api+"/message", string(body), &answer); res.StatusCode != status || (answer.Error == "") != (status == 200) {
				p.Errorf("%s %s: %s, %+v; want %d", deed, m.ID, res.Status, answer, status)
			}
		}
		u, d, q := all.Messages[0], all.Messages[1], all.Messages[2]
		decide(u, "requeue", 409)
		decide(u, "cancel", 409)
		decide(u, "burn", 400)
		p.is("u", outbox.Unknown)
		decide(u, "sent", 200)
		p.is("u", outbox.Accepted)
		decide(d, "requeue", 200)
		p.is(d.ID, outbox.Queued)
		decide(q, "cancel", 200)
		p.is("q1", outbox.Cancelled)
		decide(itemRecord{ID: "none"}, "cancel", 409)

		// What was shown before it was decided about, and is unknown anew since, is left alone.
		p.put("twice", outbox.Unknown)
		shown := get("state=unknown", "twice").Messages[0]
		decide(shown, "resend", 200)
		if err := p.store.Change(p.Context(), "twice", func(i *outbox.Item) error { i.State = outbox.Unknown; return nil }); err != nil {
			p.Fatal(err)
		}
		decide(shown, "resend", 409)
		p.is("twice", outbox.Unknown)
	})
}

func TestOutboxPageIsGuarded(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("q", outbox.Queued)
		page := p.servePage()
		i, err := p.store.Get(p.Context(), "q")
		if err != nil {
			p.Fatal(err)
		}
		order, err := json.Marshal(map[string]any{"id": "q", "deed": "cancel", "changed": i.Changed})
		if err != nil {
			p.Fatal(err)
		}
		for _, headers := range [][]string{
			{"Host", "evil.example"}, {"Sec-Fetch-Site", "cross-site"}, {"Origin", "http://evil.example"}, {"Sec-Fetch-Site", "same-site", "Origin", "http://127.0.0.1:3000"},
		} {
			if res := ask(p.T, "POST", page+"api/v1/message", string(order), nil, headers...); res.StatusCode != 403 {
				p.Errorf("%q: %s", headers, res.Status)
			}
		}
		if res := ask(p.T, "POST", page+"api/v1/message", string(order), nil, "Content-Type", "text/plain"); res.StatusCode != 400 {
			p.Errorf("a form: %s", res.Status)
		}
		p.is("q", outbox.Queued)
		if res := ask(p.T, "GET", page+"api/v1/messages", "", nil, "Host", "evil.example"); res.StatusCode != 403 {
			p.Errorf("a name that was rebound: %s", res.Status)
		}
		res := ask(p.T, "GET", page, "", nil)
		if res.StatusCode != 200 || res.Header.Get("Content-Security-Policy") != guard.PagePolicy || res.Header.Get("X-Frame-Options") != "DENY" {
			p.Errorf("%s, %v", res.Status, res.Header)
		}
		if res := ask(p.T, "GET", page+"api/v1/counts", "", nil); res.Header.Get("Content-Security-Policy") != guard.DataPolicy {
			p.Errorf("%v", res.Header)
		}
	})
}

func TestOutboxPageWantsItsToken(t *testing.T) {
	onEachStore(t, func(p *place) {
		const token = "0123456789abcdef"
		link := p.servePage("--token-file", write(p.T, filepath.Join(p.TempDir(), "token"), token+"\n"))
		page, _, ok := strings.Cut(link, "login?link=")
		if !ok {
			p.Fatalf("the page is at %s", link)
		}
		for header, want := range map[string]int{"": 401, "Bearer x": 401, "Bearer " + token: 200} {
			if res := ask(p.T, "GET", page+"api/v1/messages", "", nil, "Authorization", header); res.StatusCode != want {
				p.Errorf("%q: %s, want %d", header, res.Status, want)
			}
		}
		for _, want := range []bool{true, false} { // the link is good once
			if res := ask(p.T, "GET", link, "", nil); (len(res.Cookies()) == 1) != want {
				p.Errorf("a cookie: %t, want %t", !want, want)
			}
		}
	})
}

func TestOutboxPageSettings(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.run(exitUsage, words("page --http nowhere"), "--http", "127.0.0.1:8026")
		p.run(exitUsage, words("page --token-file "+write(p.T, filepath.Join(p.TempDir(), "token"), "short")), "16 characters")
		taken := strings.TrimSuffix(strings.TrimPrefix(p.servePage(), "http://"), "/")
		p.run(exitStore, words("page --http "+taken), "in use")
	})
}

func TestOutboxPageLoadsNothingFromElsewhere(t *testing.T) {
	files, err := fs.Glob(outboxPages, "*")
	if err != nil || len(files) < 5 {
		t.Fatalf("%q, %v", files, err)
	}
	for _, name := range files {
		text, err := fs.ReadFile(outboxPages, name)
		if err != nil {
			t.Fatal(err)
		}
		s := strings.ReplaceAll(string(text), `xmlns="http://www.w3.org/2000/svg"`, "")
		for _, bad := range []string{`https?://`, `(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(`, `(?i)<script>|<style|\sstyle=|\son[a-z]+=`} {
			if found := regexp.MustCompile(bad).FindString(s); found != "" {
				t.Errorf("%s has %q", name, found)
			}
		}
	}
}
