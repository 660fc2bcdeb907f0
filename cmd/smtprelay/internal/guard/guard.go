// Package guard has what the program's web pages share: who may use them, what a browser may do with them, and how they are served.
package guard

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"
)

const (
	linkLife = 15 * time.Minute // how long a link opens the page
	readBody = 10 * time.Second // how long a request may take to bring its body
)

// The policies of what is served. A mail's HTML has one of its own.
const (
	PagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
	DataPolicy = "sandbox; default-src 'none'; frame-ancestors 'none'"
)

// A Guard decides who may use a page and its API.
//
// Without a token, which there is on loopback only, it is everybody who reaches it; but not a web page that the user's browser
// happens to show. Such a page can send requests to loopback, which CrossOriginProtection and foreign refuse, and with a name
// that it lets resolve to 127.0.0.1 (DNS rebinding) it would be of the same origin, which the check of Host refuses. With a token
// a request needs it, or the cookie that a link or the token has set; a name that was rebound has no cookie.
type Guard struct {
	token   string // "" means that none is needed
	cookie  string // the name of the cookie
	session string // what the cookie says
	origin  *http.CrossOriginProtection
	pages   fs.FS // has login.html

	mu    sync.Mutex
	links map[string]time.Time // that were not used yet, and when they end
}

// New returns a Guard. Where l is not on loopback, and token is "", it makes a token. pages has login.html.
//
// The port is part of the cookie's name: all ports of a host share their cookies, and two pages would log each other's users out.
func New(l net.Listener, token string, pages fs.FS) *Guard {
	at := l.Addr().(*net.TCPAddr)
	if token == "" && !at.IP.IsLoopback() {
		token = rand.Text()
	}
	return &Guard{
		token: token, cookie: fmt.Sprintf("smtprelay-%d", at.Port), session: rand.Text(),
		origin: http.NewCrossOriginProtection(), links: map[string]time.Time{}, pages: pages,
	}
}

// CheckToken returns an error where a token is so short that it can be guessed; "" is none.
func CheckToken(token string) error {
	if token != "" && len(token) < 16 {
		return errors.New("the token is too short: want 16 characters or more")
	}
	return nil
}

// Token is what users must know, or "".
func (g *Guard) Token() string { return g.token }

// URL is the address of a page that is served at addr. With a token it is a link that opens the page once.
func (g *Guard) URL(addr net.Addr) string {
	u := url.URL{Scheme: "http", Host: Reachable(addr.String()), Path: "/"}
	if g.token != "" {
		u.Path, u.RawQuery = "/login", url.Values{"link": {g.NewLink()}}.Encode()
	}
	return u.String()
}

// Reachable is the address at which this machine reaches a listener. One of all addresses takes IPv4 too.
func Reachable(addr string) string {
	at, err := netip.ParseAddrPort(addr)
	if err != nil || !at.Addr().IsUnspecified() {
		return addr
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port()).String()
}

// Server serves next, guarded. The end of ctx ends the requests.
func (g *Guard) Server(ctx context.Context, next http.Handler) *http.Server {
	return &http.Server{
		Handler:           g.protect(next),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
}

// Page answers with a file of pages.
func Page(w http.ResponseWriter, pages fs.FS, name string, status int) {
	text, err := fs.ReadFile(pages, name)
	if err != nil {
		panic(err) // it is not in the program
	}
	w.Header().Set("Content-Security-Policy", PagePolicy)
	w.Header().Set("X-Frame-Options", "DENY")
	w.Header().Set("Content-Type", map[string]string{"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}[name[strings.LastIndexByte(name, '.')+1:]])
	w.WriteHeader(status)
	w.Write(text)
}

// Answer answers with JSON.
func Answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // it is never HTML
	e.Encode(v)
}

// Fail answers with an error.
func Fail(w http.ResponseWriter, status int, text string) {
	Answer(w, status, map[string]string{"error": text})
}

// protect returns next, guarded.
func (g *Guard) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", DataPolicy)
		h.Set("X-DNS-Prefetch-Control", "off")
		if r.ContentLength != 0 { // of requests with a body none waits for anything
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(readBody))
		}
		switch {
		case g.token == "" && !loopbackHost(r.Host):
			Fail(w, http.StatusForbidden, "the Host of the request is not this machine's: use http://127.0.0.1 or http://localhost")
		case g.origin.Check(r) != nil || foreign(r):
			Fail(w, http.StatusForbidden, "the request comes from another site")
		case r.URL.Path == "/login":
			g.login(w, r)
		case !g.knows(r):
			g.refuse(w, r)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// loopbackHost reports whether the Host of a request names this machine in a way that no name server has a say in.
func loopbackHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// foreign reports whether a browser sends the request for another site, unless it only goes to the page.
func foreign(r *http.Request) bool {
	site := r.Header.Get("Sec-Fetch-Site")
	opens := r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document" && (r.URL.Path == "/" || r.URL.Path == "/login")
	return site != "" && site != "same-origin" && site != "none" && !opens
}

func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// knows reports whether the request may pass: it has the token or the cookie, or none is needed.
func (g *Guard) knows(r *http.Request) bool {
	if g.token == "" {
		return true
	}
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") && same(token, g.token) {
		return true
	}
	c, err := r.Cookie(g.cookie)
	return err == nil && same(c.Value, g.session)
}

func (g *Guard) refuse(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("WWW-Authenticate", "Bearer")
	if r.URL.Path == "/" {
		http.Redirect(w, r, "/login", http.StatusSeeOther)
		return
	}
	Fail(w, http.StatusUnauthorized, "the token is missing or wrong: send it as \"Authorization: Bearer TOKEN\"")
}

// login sets the cookie for who comes with a link, or with the token, and asks others for it.
func (g *Guard) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
	link, token := r.URL.Query().Get("link"), r.PostFormValue("token")
	switch {
	case g.token == "" || g.knows(r):
	case r.Method == http.MethodGet && g.useLink(link), r.Method == http.MethodPost && same(token, g.token):
		http.SetCookie(w, &http.Cookie{Name: g.cookie, Value: g.session, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode})
	default:
		status := http.StatusOK
		if link != "" || token != "" {
			status = http.StatusUnauthorized
		}
		Page(w, g.pages, "login.html", status)
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// NewLink returns the secret of a link that opens the page once.
func (g *Guard) NewLink() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	for link, end := range g.links {
		if now.After(end) {
			delete(g.links, link)
		}
	}
	link := rand.Text()
	g.links[link] = now.Add(linkLife)
	return link
}

// useLink reports whether a link is good, and is used up then.
func (g *Guard) useLink(link string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	end, ok := g.links[link]
	delete(g.links, link)
	return ok && time.Now().Before(end)
}
