package smtprelay

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/nodes"
	"github.com/smtprelay/smtprelay/internal/scrub"
)

// settings is a checked Config with defaults, and the state that all connections of the Client share.
type settings struct {
	Config            // with defaults filled in; Password is empty
	password   secret // Config.Password
	host, port string // from Addr
	tls        *tls.Config
	split      int // maximum recipients per transaction, for messages that may be split; 0 means no limit
	profile    profile
	nodes      nodes.Health
	said       scrub.Known  // credentials sent in AUTH
	opening    atomic.Value // Op: the step that a dial in progress has reached; of several dials, the last to progress
	stats      counters
	noPlain    atomic.Bool // the relay has refused the mechanism PLAIN, and offers LOGIN

	conns *conn.Options
}

const defaultAddr = "smtp.sendgrid.net:587"

// check reports all mistakes in c and fills in defaults.
func (c Config) check() (*settings, error) {
	s := &settings{Config: c, password: newSecret(c.Password), profile: profile{authTurn: make(chan struct{}, 1)}}
	s.Config.Password = ""
	if t := c.Trace; t != nil && t.Learned != nil {
		s.profile.tell = func(info LearnedInfo) {
			info.Name, info.Addr = s.Name, s.Addr
			t.Learned(context.Background(), info)
		}
	}
	s.said.Expect(c.Password)
	if s.Addr == "" {
		s.Addr = defaultAddr
	}
	var wrong mistakes
	s.host, s.port = wrong.splitAddr(s.Addr)
	if c.Username == "" && c.Password != "" && c.Auth == nil && isSendGrid(s.host) {
		s.Username = "apikey"
	}
	wrong.inCredentials(c, s.host)
	wrong.inModes(c, s.port)
	wrong.inLimits(c)
	if len(wrong) > 0 {
		return nil, errors.Join(wrong...)
	}
	s.Limits = c.Limits.withDefaults()
	s.split = orDefault(c.Limits.MaxRecipients, 1000)
	s.Retry = c.Retry.withDefaults()
	s.MaxInFlight = orDefault(c.MaxInFlight, 4)
	s.Timeouts = c.Timeouts.withDefaults()
	s.tls = tlsConfig(c.TLSConfig, s.host)
	s.conns = s.connOptions()
	return s, nil
}

// mistakes are the errors found in a Config.
type mistakes []error

func (m *mistakes) add(format string, args ...any) { *m = append(*m, fmt.Errorf(format, args...)) }

// splitAddr returns the host and port of addr.
func (m *mistakes) splitAddr(addr string) (host, port string) {
	host, port, err := net.SplitHostPort(addr)
	switch {
	case isPath(addr):
		m.add("Addr is a path and not host:port: use Config.Dial to connect to a socket; Addr then names the relay, such as localhost:25")
	case strings.Contains(addr, "@") || strings.Contains(addr, "://"):
		m.add("Addr is not host:port but a URL or a part of one: see ParseURL") // not quoted: it may contain the password
	case err != nil && !strings.Contains(addr, ":"):
		m.add("Addr %q has no port; try %q", addr, addr+":587")
	case err != nil:
		m.add("Addr %q is not host:port: %s", addr, err.(*net.AddrError).Err)
	case host == "":
		m.add("Addr %q has no host", addr)
	case strings.ContainsFunc(host, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }):
		m.add("Addr %q: the host has white space or control characters in it", addr)
	case !utf8.ValidString(host):
		m.add("Addr %q: the host is not valid UTF-8", addr)
	case strings.Contains(host, ":") && !isAddress(host):
		m.add("Addr %q: the host has colons but is not an IPv6 address", addr)
	case !validPort(port):
		m.add("Addr %q: the port is not a number from 1 to 65535", addr)
	}
	return host, port
}

// isPath reports whether addr looks like the path of a socket.
func isPath(addr string) bool {
	for _, prefix := range []string{"unix:", "unixpacket:", "/", "./", "../", "~/", `\\`} {
		if len(addr) >= len(prefix) && strings.EqualFold(addr[:len(prefix)], prefix) {
			return true
		}
	}
	return false
}

func (m *mistakes) inCredentials(c Config, host string) {
	switch {
	case c.Auth != nil && (c.Username != "" || c.Password != ""):
		m.add("Auth is set together with Username or Password: leave one out")
	case c.Auth != nil:
	case c.Addr == "" && c.Password != "" && !strings.HasPrefix(c.Password, "SG."):
		m.add("Addr is empty, which means %s, and Password is no SendGrid API key, which begins with SG.: set Addr to the relay whose password it is", defaultAddr)
	case c.Password == "" && c.Username != "":
		m.add("Password is empty, but Username is set") // Username may contain the key, so it is not quoted
	case c.Password == "" && isSendGrid(host):
		m.add("Password is empty: SendGrid wants an API key")
	case c.Password != "" && c.Username == "" && host != "" && !isSendGrid(host):
		m.add("Username is empty, but Password is set; only for SendGrid's hosts it may be left out")
	}
	if strings.ContainsRune(c.Username, 0) || strings.ContainsRune(c.Password, 0) {
		m.add("Username or Password contains a NUL")
	}
	if c.Password != strings.TrimSpace(c.Password) {
		m.add("Password begins or ends with white space; a key read from a file often ends with a newline")
	}
}

func (m *mistakes) inModes(c Config, port string) {
	if c.TLS < TLSByPort || c.TLS > TLSNone {
		m.add("TLS is %d: want TLSByPort, TLSImplicit, TLSStartTLS, TLSOpportunistic or TLSNone", c.TLS)
	}
	if c.TLS == TLSNone && (port == "465" || port == "2465") {
		m.add("TLS is TLSNone, but port %s speaks TLS from the first byte", port)
	}
	if c.Pipelining < PipelineAuto || c.Pipelining > PipelineOff {
		m.add("Pipelining is %d: want PipelineAuto, PipelineWithin or PipelineOff", c.Pipelining)
	}
	if c.TLSConfig != nil && c.TLSConfig.MaxVersion != 0 && c.TLSConfig.MaxVersion < tls.VersionTLS12 {
		m.add("TLSConfig.MaxVersion is below TLS 1.2")
	}
	m.inLocalName(c.LocalName)
}

func (m *mistakes) inLocalName(name string) {
	bare := strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	switch addr, err := netip.ParseAddr(bare); {
	case name == "", validHostName(name), validLiteral(name):
	case err == nil:
		m.add("LocalName %q is an address: write it as the literal %q (RFC 5321, 4.1.3)", name, addressLiteral(addr))
	case validDomain(name) && strings.Contains(name, "_"):
		m.add("LocalName %q has an underscore, which no host name has and relays refuse", name)
	default:
		m.add("LocalName %q is neither a domain name nor an address literal such as [192.0.2.1]", name)
	}
}

func (m *mistakes) inLimits(c Config) {
	if c.Limits.MaxConns < 0 || c.Limits.MaxConns > 10000 {
		m.add("Limits.MaxConns is %d: want 1 to 10000, or 0 for 10", c.Limits.MaxConns)
	}
	if c.MaxInFlight < 0 || c.MaxInFlight > 1000 {
		m.add("MaxInFlight is %d: want 1 to 1000, or 0 for 4", c.MaxInFlight)
	}
	if c.Limits.MaxWaiting < 0 {
		m.add("Limits.MaxWaiting is %d: want how many Sends may wait, or 0 for any number", c.Limits.MaxWaiting)
	}
	if math.IsNaN(c.Limits.Rate) || math.IsInf(c.Limits.Rate, 0) {
		m.add("Limits.Rate is %v: want messages a second", c.Limits.Rate)
	}
	if c.Timeouts.Quit < 0 {
		m.add("Timeouts.Quit is negative: it must be limited, since a relay may never close")
	}
	if c.Retry.MinBackoff < 0 || c.Retry.MaxBackoff < 0 {
		m.add("Retry.MinBackoff and MaxBackoff must not be negative")
	}
	if c.Retry.MaxBackoff > 0 && c.Retry.MaxBackoff < c.Retry.MinBackoff {
		m.add("Retry.MaxBackoff, %v, is less than MinBackoff, %v", c.Retry.MaxBackoff, c.Retry.MinBackoff)
	}
}

const defaultDial = 30 * time.Second // Timeouts.Dial

// withDefaults replaces zero by the default, and negative by 0, which means no limit from here on.
func (t Timeouts) withDefaults() Timeouts {
	t.Outage = orDefault(t.Outage, 2*time.Minute)
	t.Dial = orDefault(t.Dial, defaultDial)
	t.Greeting = orDefault(t.Greeting, 30*time.Second)
	t.TLS = orDefault(t.TLS, 30*time.Second)
	t.Command = orDefault(t.Command, 5*time.Minute)
	t.Data = orDefault(t.Data, 2*time.Minute)
	t.Write = orDefault(t.Write, 3*time.Minute)
	t.Unacked = orDefault(t.Unacked, time.Minute)
	t.FinalReply = orDefault(t.FinalReply, 10*time.Minute)
	t.Overlap = orDefault(t.Overlap, 5*time.Second)
	t.Drain = orDefault(t.Drain, 2*time.Second)
	t.Quit = orDefault(t.Quit, 5*time.Second)
	return t
}

// authenticates reports whether the Client sends AUTH.
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

const redacted = scrub.Redacted

// secret is a text that does not print. It is stored in a func, because fmt prints unexported struct fields without calling
// their methods.
type secret struct{ reveal func() string }

func newSecret(s string) secret { return secret{func() string { return s }} }

func (s secret) String() string               { return redacted }
func (s secret) GoString() string             { return redacted }
func (s secret) Format(f fmt.State, _ rune)   { f.Write([]byte(redacted)) }
func (s secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s secret) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }

// hidden returns c without its secret, for printing.
func (c Config) hidden() Config {
	if c.Password == "" {
		return c
	}
	if c.Username == c.Password { // Postmark uses its token as both
		c.Username = redacted
	}
	c.Password = redacted
	return c
}

// Format implements fmt.Formatter: it prints the Config without its password.
func (c Config) Format(f fmt.State, verb rune) {
	type plain Config // a type without Format
	fmt.Fprintf(f, fmt.FormatString(f, verb), plain(c.hidden()))
}

// LogValue implements slog.LogValuer: it logs the Config without its password.
func (c Config) LogValue() slog.Value {
	c = c.hidden()
	return slog.GroupValue(
		slog.String("name", c.Name),
		slog.String("addr", c.Addr),
		slog.String("username", c.Username),
		slog.String("tls", c.TLS.String()),
		slog.String("local_name", c.LocalName),
		slog.Any("limits", c.Limits),
		slog.Any("retry", c.Retry),
	)
}

// MarshalJSON implements json.Marshaler: it writes the fields that have a JSON form, without the password.
func (c Config) MarshalJSON() ([]byte, error) {
	c = c.hidden()
	return json.Marshal(struct {
		Name, Addr, Username, Password, TLS, LocalName string
		Limits                                         Limits
		Retry                                          Retry
		Timeouts                                       Timeouts
	}{c.Name, c.Addr, c.Username, c.Password, c.TLS.String(), c.LocalName, c.Limits, c.Retry, c.Timeouts})
}
