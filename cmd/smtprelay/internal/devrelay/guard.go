package devrelay

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// linkLife is how long a link opens the page.
const linkLife = 15 * time.Minute

// A guard decides who may use the page and the API.
//
// On loopback it is everybody who reaches it, without a token; but not a web page that the user's browser happens to show. Such
// a page can send requests to loopback, which CrossOriginProtection and foreign refuse, and with a name that it lets resolve to
// 127.0.0.1 (DNS rebinding) it would be of the same origin, which the check of Host refuses. Elsewhere, or with a token, a
// request needs the token or the cookie that a link or the token has set.
type guard struct {
	loopback bool
	token    string // "" means that none is needed
	session  string // what the cookie says
	origin   *http.CrossOriginProtection

	mu    sync.Mutex
	links map[string]time.Time // that were not used yet, and when they end
}

// cookieName is that of the cookie. Cookies of one host are shared by all its ports, so that two relays log each other's users out.
const cookieName = "smtprelay_session"

func newGuard(loopback bool, token string) *guard {
	return &guard{loopback: loopback, token: token, session: rand.Text(), origin: http.NewCrossOriginProtection(), links: map[string]time.Time{}}
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
		switch {
		case g.loopback && !loopbackHost(r.Host):
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
	c, err := r.Cookie(cookieName)
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
	case g.useLink(link), r.Method == http.MethodPost && same(token, g.token):
		http.SetCookie(w, &http.Cookie{Name: cookieName, Value: g.session, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode})
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
