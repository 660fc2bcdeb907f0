package smtprelay

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/scrub"
)

// settings are a Config that was checked and completed, and what the Client learns and counts.
type settings struct {
	Config            // with defaults filled in; Password is empty
	password   secret // what it was
	host, port string // of Addr
	tls        *tls.Config
	split      int // of recipients, where nothing keeps them together: so many in one transaction; 0 means any number
	profile    profile
	said       scrub.Known  // of the credentials, in AUTH
	opening    atomic.Value // Op: the step that the connection being opened has come to; of several, the last to move
	stats      counters

	conns *conn.Options
}

const defaultAddr = "smtp.sendgrid.net:587"

// check finds all mistakes in c and fills in what is not set.
func (c Config) check() (*settings, error) {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }

	s := &settings{Config: c, password: newSecret(c.Password)}
	s.Config.Password = ""
	s.said.Expect(c.Password)
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
	s.conns = s.connOptions()
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
