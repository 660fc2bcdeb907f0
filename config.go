package smtprelay

import (
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/smtprelay/smtprelay/internal/scrub"
)

// settings are a Config that was checked and completed, and what the Client learns and counts.
type settings struct {
	Config            // with defaults filled in; Password is empty
	password   secret // what it was
	host, port string // of Addr
	tls        *tls.Config
	split      int // of recipients, where nothing keeps them together: so many in one transaction; 0 means any number
	learnt     learnt
	said       scrub.Known  // of the credentials, in AUTH
	opening    atomic.Value // Op: the step that the connection being opened has come to; of several, the last to move
	stats      counters

	transactions sync.Pool // *transaction, to be used again; the Client's own, since they have a channel
}

const defaultAddr = "smtp.sendgrid.net:587"

// check finds all mistakes in c and fills in what is not set.
func (c Config) check() (*settings, error) {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }

	s := &settings{Config: c, password: newSecret(c.Password)}
	s.Config.Password = ""
	s.said.Expect(c.Password)
	s.transactions.New = func() any { return &transaction{signal: make(chan struct{}, 1)} }
	if s.Addr == "" {
		s.Addr = defaultAddr
	}
	var err error
	switch s.host, s.port, err = net.SplitHostPort(s.Addr); {
	case strings.Contains(s.Addr, "@") || strings.Contains(s.Addr, "://"):
		mistake("Addr is not host:port but a URL or a part of one: see ParseURL") // not quoted, for the password may be in it
	case err != nil && !strings.Contains(s.Addr, ":"):
		mistake("Addr %q has no port; try %q", s.Addr, s.Addr+":587")
	case err != nil:
		mistake("Addr %q is not host:port: %s", s.Addr, err.(*net.AddrError).Err)
	case s.host == "":
		mistake("Addr %q has no host", s.Addr)
	case strings.ContainsFunc(s.host, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }):
		mistake("Addr %q: the host has white space or control characters in it", s.Addr)
	case strings.Contains(s.host, ":") && !isAddress(s.host):
		mistake("Addr %q: the host has colons but is not an IPv6 address", s.Addr)
	case !validPort(s.port):
		mistake("Addr %q: the port is not a number from 1 to 65535", s.Addr)
	}
	sendGrid := s.host == "sendgrid.net" || strings.HasSuffix(s.host, ".sendgrid.net")
	switch {
	case c.Auth != nil && (c.Username != "" || c.Password != ""):
		mistake("Auth is set together with Username or Password: leave one out")
	case c.Auth != nil:
	case c.Password == "" && c.Username != "":
		mistake("Password is empty, but Username is set") // to the key, maybe
	case c.Password == "" && sendGrid:
		mistake("Password is empty: SendGrid wants an API key")
	case c.Username == "" && c.Password != "":
		s.Username = "apikey"
	}
	if strings.ContainsRune(c.Username, 0) || strings.ContainsRune(c.Password, 0) {
		mistake("Username or Password contains a NUL")
	}
	if c.Password != strings.TrimSpace(c.Password) {
		mistake("Password begins or ends with white space; a key read from a file often has a line end too many")
	}
	if c.TLS < TLSByPort || c.TLS > TLSNone {
		mistake("TLS is %d: want TLSByPort, TLSImplicit, TLSStartTLS or TLSNone", c.TLS)
	}
	if c.TLS == TLSNone && (s.port == "465" || s.port == "2465") {
		mistake("TLS is TLSNone, but port %s speaks TLS from the first byte", s.port)
	}
	if c.Pipelining < PipelineAcross || c.Pipelining > PipelineOff {
		mistake("Pipelining is %d: want PipelineAcross, PipelineWithin or PipelineOff", c.Pipelining)
	}
	if c.TLSConfig != nil && c.TLSConfig.MaxVersion != 0 && c.TLSConfig.MaxVersion < tls.VersionTLS12 {
		mistake("TLSConfig.MaxVersion is below TLS 1.2")
	}
	if c.LocalName != "" && !validDomain(c.LocalName) && !validLiteral(c.LocalName) {
		mistake("LocalName %q is neither a domain name nor an address literal such as [192.0.2.1]", c.LocalName)
	}
	if c.Limits.MaxConns < 0 || c.Limits.MaxConns > 10000 {
		mistake("Limits.MaxConns is %d: want 1 to 10000, or 0 for 10", c.Limits.MaxConns)
	}
	if c.Limits.MaxInFlight < 0 || c.Limits.MaxInFlight > 1000 {
		mistake("Limits.MaxInFlight is %d: want 1 to 1000, or 0 for 4", c.Limits.MaxInFlight)
	}
	if c.Timeouts.Quit < 0 {
		mistake("Timeouts.Quit is negative: a relay that never closes would be waited for without end")
	}
	if c.Retry.MinBackoff < 0 || c.Retry.MaxBackoff < 0 {
		mistake("Retry.MinBackoff and MaxBackoff must not be negative")
	}
	if c.Retry.MaxBackoff > 0 && c.Retry.MaxBackoff < c.Retry.MinBackoff {
		mistake("Retry.MaxBackoff, %v, is less than MinBackoff, %v", c.Retry.MaxBackoff, c.Retry.MinBackoff)
	}
	if len(mistakes) > 0 {
		return nil, errors.Join(mistakes...)
	}
	s.Limits = c.Limits.withDefaults()
	s.split = orDefault(c.Limits.MaxRecipients, 1000)
	s.Retry = c.Retry.withDefaults()
	s.Timeouts = c.Timeouts.withDefaults()
	s.tls = tlsConfig(c.TLSConfig, s.host)
	return s, nil
}

// withDefaults replaces zero by the default, and negative by 0, which means no limit from here on.
func (t Timeouts) withDefaults() Timeouts {
	t.Dial = orDefault(t.Dial, 30*time.Second)
	t.Greeting = orDefault(t.Greeting, 5*time.Minute)
	t.TLS = orDefault(t.TLS, 30*time.Second)
	t.Command = orDefault(t.Command, 5*time.Minute)
	t.Data = orDefault(t.Data, 2*time.Minute)
	t.Write = orDefault(t.Write, 3*time.Minute)
	t.FinalReply = orDefault(t.FinalReply, 10*time.Minute)
	t.Overlap = orDefault(t.Overlap, 5*time.Second)
	t.Quit = orDefault(t.Quit, 5*time.Second)
	return t
}

// authenticates reports whether AUTH is wanted.
func (c *settings) authenticates() bool {
	return c.Auth != nil || c.Username != "" || c.password.reveal() != ""
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// validDomain reports whether s may stand in EHLO as a domain (RFC 5321, 4.1.2).
func validDomain(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !(c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z') {
				return false
			}
		}
	}
	return true
}

// validLiteral reports whether s is an address literal (RFC 5321, 4.1.3).
func validLiteral(s string) bool {
	inner, ok := strings.CutPrefix(s, "[")
	if !ok {
		return false
	}
	if inner, ok = strings.CutSuffix(inner, "]"); !ok {
		return false
	}
	inner, v6 := strings.CutPrefix(inner, "IPv6:")
	ip := net.ParseIP(inner)
	return ip != nil && v6 == strings.Contains(inner, ":")
}

// ParseURL reads a Config from one setting, as a service has it:
//
//	smtps://apikey:KEY@smtp.sendgrid.net:465?max_conns=10
//
// The scheme "smtps" means TLS from the first byte (default port 465), "smtp" means STARTTLS required (default port 587),
// and "smtp+insecure" no TLS (default port 25). On port 465 "smtp" is TLS from the first byte too. User name and password
// must be percent-encoded where they contain characters that a URL gives a meaning.
//
// The query may set max_conns, max_messages, max_recipients, max_in_flight, max_attempts (whole numbers), max_idle, max_age (durations
// such as 30s), local_name, and pipelining (across, within, off). Anything else is an error. The error never shows the
// password.
func ParseURL(rawURL string) (Config, error) {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	fail := func() (Config, error) {
		return Config{}, &Error{Op: OpConfig, Outcome: NotAccepted, Err: errors.Join(mistakes...), permanent: true}
	}
	if rawURL != strings.TrimSpace(rawURL) {
		mistake("the URL begins or ends with white space; one read from a file often has a line end too many")
		return fail()
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		// The error of url.Parse quotes the URL, password and all.
		mistake("the URL cannot be parsed; want smtps://user:password@host:port with special characters in user and password percent-encoded")
		return fail()
	}
	switch {
	case u.Scheme == "" || u.Opaque != "": // the scheme of user:password@host is the user
		mistake("the URL has no scheme: want smtps://, smtp:// or smtp+insecure://")
		return fail()
	case u.Path != "" && u.Path != "/" || u.Fragment != "" || strings.Contains(u.RawQuery, "@"):
		// Nothing else is said: whatever there is may be a piece of the password.
		mistake("the URL has a path, a fragment or an @ in its query, which mean nothing here (is a / # or ? in the password not percent-encoded?)")
		return fail()
	}
	var cfg Config
	port := u.Port()
	switch u.Scheme {
	case "smtps":
		cfg.TLS, port = TLSImplicit, orPort(port, "465")
	case "smtp":
		cfg.TLS, port = TLSByPort, orPort(port, "587")
	case "smtp+insecure":
		cfg.TLS, port = TLSNone, orPort(port, "25")
	default:
		mistake("scheme %q: want smtps, smtp or smtp+insecure", u.Scheme)
	}
	if u.Hostname() == "" {
		mistake("the URL has no host")
	}
	cfg.Addr = net.JoinHostPort(u.Hostname(), port)
	if u.User != nil {
		cfg.Username = u.User.Username()
		cfg.Password, _ = u.User.Password()
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		mistake("the query cannot be parsed")
	}
	for _, key := range slices.Sorted(maps.Keys(query)) {
		if len(query[key]) > 1 {
			mistake("%q stands twice", key)
		} else if err := cfg.setParam(key, query.Get(key)); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	if len(mistakes) > 0 {
		return fail()
	}
	if _, err := cfg.check(); err != nil {
		mistakes = append(mistakes, err)
		return fail()
	}
	return cfg, nil
}

func (c *Config) setParam(key, value string) error {
	number := func(to *int) error {
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("%s=%q: want a whole number", key, value)
		}
		*to = n
		return nil
	}
	duration := func(to *time.Duration) error {
		d, err := time.ParseDuration(value)
		if err != nil {
			return fmt.Errorf("%s=%q: want a duration such as 30s", key, value)
		}
		*to = d
		return nil
	}
	switch key {
	case "max_conns":
		return number(&c.Limits.MaxConns)
	case "max_messages":
		return number(&c.Limits.MaxMessagesPerConn)
	case "max_recipients":
		return number(&c.Limits.MaxRecipients)
	case "max_in_flight":
		return number(&c.Limits.MaxInFlight)
	case "max_attempts":
		return number(&c.Retry.MaxAttempts)
	case "max_idle":
		return duration(&c.Limits.MaxIdleTime)
	case "max_age":
		return duration(&c.Limits.MaxConnAge)
	case "local_name":
		c.LocalName = value
	case "pipelining":
		modes := map[string]Pipelining{"across": PipelineAcross, "within": PipelineWithin, "off": PipelineOff}
		mode, ok := modes[value]
		if !ok {
			return fmt.Errorf("pipelining=%q: want across, within or off", value)
		}
		c.Pipelining = mode
	default:
		return fmt.Errorf("unknown parameter %q", key)
	}
	return nil
}

func orPort(port, def string) string {
	if port == "" {
		return def
	}
	return port
}
