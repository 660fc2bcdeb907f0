package devrelay

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	linkLife = 15 * time.Minute // how long a link opens the page
	readBody = 10 * time.Second // how long a request may take to bring its body
)

// A guard decides who may use the page and the API.
//
// Without a token, which there is on loopback only, it is everybody who reaches it; but not a web page that the user's browser
// happens to show. Such a page can send requests to loopback, which CrossOriginProtection and foreign refuse, and with a name
// that it lets resolve to 127.0.0.1 (DNS rebinding) it would be of the same origin, which the check of Host refuses. With a token
// a request needs it, or the cookie that a link or the token has set; a name that was rebound has no cookie.
type guard struct {
	token   string // "" means that none is needed
	cookie  string // the name of the cookie
	session string // what the cookie says
	origin  *http.CrossOriginProtection

	mu    sync.Mutex
	links map[string]time.Time // that were not used yet, and when they end
}

// newGuard returns a guard. The port is part of the cookie's name: all ports of a host share their cookies, and two relays would log
// each other's users out.
func newGuard(token string, port int) *guard {
	return &guard{
		token: token, cookie: fmt.Sprintf("smtprelay-%d", port), session: rand.Text(),
		origin: http.NewCrossOriginProtection(), links: map[string]time.Time{},
	}
}

// protect returns next, guarded.
func (g *guard) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Security-Policy", dataPolicy)
		h.Set("X-DNS-Prefetch-Control", "off")
		if r.ContentLength != 0 { // of requests with a body none waits for anything
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(readBody))
		}
		switch {
		case g.token == "" && !loopbackHost(r.Host):
			fail(w, http.StatusForbidden, "the Host of the request is not this machine's: use http://127.0.0.1 or http://localhost")
		case g.origin.Check(r) != nil || foreign(r):
			fail(w, http.StatusForbidden, "the request comes from another site")
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
func (g *guard) knows(r *http.Request) bool {
	if g.token == "" {
		return true
	}
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") && same(token, g.token) {
		return true
	}
	c, err := r.Cookie(g.cookie)
	return err == nil && same(c.Value, g.session)
}

func (g *guard) refuse(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("WWW-Authenticate", "Bearer")
	if r.URL.Path == "/" {
		http.Redirect(w, r, "/login", http.StatusSeeOther)
		return
	}
	fail(w, http.StatusUnauthorized, "the token is missing or wrong: send it as \"Authorization: Bearer TOKEN\"")
}

// login sets the cookie for who comes with a link, or with the token, and asks others for it.
func (g *guard) login(w http.ResponseWriter, r *http.Request) {
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
		servePage(w, "login.html", status)
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// newLink returns the secret of a link that opens the page once.
func (g *guard) newLink() string {
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
func (g *guard) useLink(link string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	end, ok := g.links[link]
	delete(g.links, link)
	return ok && time.Now().Before(end)
}
