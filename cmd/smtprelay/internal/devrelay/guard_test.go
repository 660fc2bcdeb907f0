// Who may use the page and the API: the token, the one-time link, DNS rebinding, requests of other sites.
package devrelay

import (
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
)

// status sends a request with headers ("Host" among them) and returns the answer, whose body is closed.
func status(t *testing.T, r *Relay, method, path string, headers ...string) *http.Response {
	t.Helper()
	body := strings.NewReader("")
	if method == "POST" && strings.HasSuffix(path, "/faults") {
		body = strings.NewReader(`{"text":"quit=drop"}`)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("http://127.0.0.1:%d%s", r.webAddr.Port, path), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res
}

func TestOnLoopbackOtherSitesAreRefused(t *testing.T) {
	r := startRelay(t, nil)
	host := r.webAddr.String()
	for _, c := range []struct {
		name         string
		method, path string
		headers      []string
		want         int
	}{
		{"a program", "POST", "/api/v1/faults", nil, 201},
		{"a program by another name of loopback", "GET", "/api/v1/relay", []string{"Host", "localhost:1"}, 200},
		{"IPv6", "GET", "/api/v1/relay", []string{"Host", "[::1]:8025"}, 200},
		{"without a port", "GET", "/api/v1/relay", []string{"Host", "127.9.9.9"}, 200},
		{"a name that was rebound", "GET", "/api/v1/relay", []string{"Host", "evil.example"}, 403},
		{"such a name with a port", "GET", "/", []string{"Host", "evil.example:8025"}, 403},
		{"a name that begins like loopback", "GET", "/api/v1/relay", []string{"Host", "127.0.0.1.evil.example"}, 403},
		{"a name that ends like it", "GET", "/api/v1/relay", []string{"Host", "evil.localhost.example"}, 403},
		{"an address of the network", "GET", "/api/v1/relay", []string{"Host", "192.168.1.1:8025"}, 403},
		{"the page itself", "POST", "/api/v1/faults", []string{"Sec-Fetch-Site", "same-origin", "Origin", "http://" + host}, 201},
		{"another site", "POST", "/api/v1/faults", []string{"Sec-Fetch-Site", "cross-site", "Origin", "http://evil.example"}, 403},
		{"another port of this machine", "POST", "/api/v1/faults", []string{"Sec-Fetch-Site", "same-site", "Origin", "http://127.0.0.1:3000"}, 403},
		{"an old browser", "POST", "/api/v1/faults", []string{"Origin", "http://evil.example"}, 403},
		{"a mail's frame", "POST", "/api/v1/faults", []string{"Origin", "null"}, 403},
		{"a form", "POST", "/api/v1/faults", []string{"Content-Type", "text/plain"}, 415},
		{"deleting from another site", "DELETE", "/api/v1/messages", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"reading from another site", "GET", "/api/v1/messages", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"}, 403},
		{"opening a mail from another site", "GET", "/mail/x/html", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 403},
		{"a link to the page", "GET", "/", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"the page in another's frame", "GET", "/", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 403},
		{"typed", "GET", "/", []string{"Sec-Fetch-Site", "none"}, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := status(t, r, c.method, c.path, c.headers...); got.StatusCode != c.want {
				t.Errorf("%s %s %q: %d, want %d", c.method, c.path, c.headers, got.StatusCode, c.want)
			}
		})
	}
}

func TestElsewhereATokenIsNeeded(t *testing.T) {
	r := startRelay(t, func(c *Config) { c.HTTP = "0.0.0.0:0" })
	if len(r.Token()) < 20 {
		t.Fatalf("the token is %q", r.Token())
	}
	for _, path := range []string{"/api/v1/relay", "/api/v1/events", "/mail/x/html", "/page.js", "/api/v1/nothing"} {
		for _, auth := range []string{"", "Bearer ", "Bearer wrong", "Basic " + r.Token(), r.Token()} {
			if got := status(t, r, "GET", path, "Authorization", auth); got.StatusCode != 401 || got.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s with %q: %d", path, auth, got.StatusCode)
			}
		}
	}
	if got := status(t, r, "GET", "/api/v1/relay", "Authorization", "bearer "+r.Token(), "Host", "relay.internal:8025"); got.StatusCode != 200 {
		t.Errorf("with the token: %d", got.StatusCode)
	}
	if got := status(t, r, "GET", "/"); got.StatusCode != 303 || got.Header.Get("Location") != "/login" {
		t.Errorf("the page: %d to %s", got.StatusCode, got.Header.Get("Location"))
	}
	if got := status(t, r, "GET", "/login"); got.StatusCode != 200 || len(got.Cookies()) != 0 {
		t.Errorf("the question for the token: %d, cookies %v", got.StatusCode, got.Cookies())
	}
	if got := status(t, r, "POST", "/api/v1/faults", "Authorization", "Bearer "+r.Token(), "Origin", "http://evil.example"); got.StatusCode != 403 {
		t.Errorf("another site with the token: %d", got.StatusCode)
	}
}

func TestALinkOpensThePageOnce(t *testing.T) {
	r := startRelay(t, func(c *Config) { c.HTTP, c.Token = "0.0.0.0:0", "a token of my own" })
	link := r.PageURL()
	if got := status(t, r, "HEAD", strings.TrimPrefix(link, web(r)[:7]+guard.Reachable(r.webAddr.String()))); got.StatusCode != 401 {
		t.Errorf("a look at the link: %d", got.StatusCode)
	}
	open := func() (*http.Client, *http.Response) {
		jar, _ := cookiejar.New(nil)
		c := &http.Client{Jar: jar}
		res, err := c.Get(link)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return c, res
	}
	c, res := open()
	if res.StatusCode != 200 || res.Request.URL.Path != "/" {
		t.Fatalf("%d at %s", res.StatusCode, res.Request.URL)
	}
	at := *res.Request.URL
	at.Path = "/api/v1/relay"
	if res, err := c.Get(at.String()); err != nil || res.StatusCode != 200 {
		t.Errorf("the API by the cookie: %v %v", res, err)
	}
	for _, cookie := range c.Jar.Cookies(&at) {
		if cookie.Value == r.Token() {
			t.Error("the cookie is the token")
		}
	}
	if _, res := open(); res.StatusCode != 401 {
		t.Errorf("a second time: %d", res.StatusCode)
	}
	if got := status(t, r, "GET", "/login?link="); got.StatusCode != 200 || len(got.Cookies()) != 0 {
		t.Errorf("an empty link: %d, cookies %v", got.StatusCode, got.Cookies())
	}

	post := func(token string) *http.Response {
		req, _ := http.NewRequest("POST", at.Scheme+"://"+at.Host+"/login", strings.NewReader(url.Values{"token": {token}}.Encode()))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res
	}
	if got := post("wrong"); got.StatusCode != 401 || len(got.Cookies()) != 0 {
		t.Errorf("a wrong token: %d", got.StatusCode)
	}
	got := post("a token of my own")
	if got.StatusCode != 303 || len(got.Cookies()) != 1 {
		t.Fatalf("the token: %d, cookies %v", got.StatusCode, got.Cookies())
	}
	if cookie := got.Cookies()[0]; !cookie.HttpOnly || cookie.SameSite != http.SameSiteStrictMode || cookie.Path != "/" {
		t.Errorf("cookie %v", cookie)
	}
}
