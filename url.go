package smtprelay

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/preset"
)

// ParseURL returns the Config for a URL, such as the value of an environment variable:
//
//	smtps://apikey:KEY@smtp.sendgrid.net:465?max_conns=10
//
// The scheme "smtps" means TLS from the first byte (default port 465), "smtp" means STARTTLS required (default port 587),
// and "smtp+insecure" no TLS (default port 25). With "smtp+insecure", credentials may cross the network in the clear. On port 465,
// "smtp" means TLS from the first byte too. Percent-encode characters in user name and password that have a meaning in a URL.
//
// The schemes of package preset fill in host, port, user name and limits of a well-known relay, as in sendgrid://:KEY@ and
// ses://USER:PASSWORD@eu-west-1. The host part then selects one of the relay's hosts, such as a region, or is empty.
//
// The query may set any of the following, once each; anything else is an error:
//
//	max_conns, max_messages, max_recipients, max_in_flight, max_waiting,
//	max_attempts                                                           whole numbers
//	rate                                                                   messages a second, such as 14 or 0.5
//	max_idle, max_age, min_backoff, max_backoff                            durations such as 30s
//	dial_timeout, greeting_timeout, tls_timeout, command_timeout, data_timeout, write_timeout, final_reply_timeout,
//	overlap_timeout, drain_timeout, quit_timeout, outage_timeout           durations
//	retry_4xx, chunking, insecure_auth                                     on or off (Retry.On4xx, Chunking, AllowInsecureAuth)
//	pipelining                                                             auto, within or off
//	tls                                                                    implicit, starttls, opportunistic or none
//	ca                                                                     a PEM file: certificates to trust instead of the system's roots
//	server_name                                                            the name in the relay's certificate
//	local_name, name                                                       Config.LocalName and Config.Name
//
// ParseURL reads no file except that of ca. It reports all mistakes at once, in one *[Error] with [OpConfig] that never shows the
// password.
func ParseURL(rawURL string) (Config, error) {
	var wrong mistakes
	fail := func() (Config, error) {
		return Config{}, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: errors.Join(wrong...), permanent: true}
	}
	if trimmed := strings.TrimSpace(rawURL); rawURL != trimmed {
		wrong.add("the URL begins or ends with white space; a URL read from a file often ends with a newline")
		rawURL = trimmed
	}
	u, err := url.Parse(rawURL)
	switch {
	case rawURL == "":
		wrong.add("the URL is empty: is the variable or the file that holds it set? Want smtps://, smtp:// or smtp+insecure://")
		return fail()
	case err != nil:
		wrong.add("the URL cannot be parsed: %s; want smtps://user:password@host:port with special characters in user and password percent-encoded", parseMistake(err))
		return fail()
	case isPath(rawURL):
		wrong.add("the URL is a path: use Config.Dial to connect to a socket")
		return fail()
	case u.Scheme == "" || u.Opaque != "": // url.Parse takes the user of user:password@host for the scheme
		wrong.add("the URL has no scheme: want smtps://, smtp:// or smtp+insecure://")
		return fail()
	case strings.Contains(u.Path+u.Fragment+u.RawQuery, "@") || strings.Contains(u.RawFragment, "@"):
		// Report nothing else: any part of the URL may be a piece of the password.
		wrong.add("the URL has an @ after the first / # or ?: one of these is in the password, and is not percent-encoded (%%2F, %%23, %%3F)")
		return fail()
	}
	if u.Path != "" && u.Path != "/" {
		wrong.add("the URL has a path, which means nothing here (a / in the password is written %%2F)")
	}
	if u.Fragment != "" {
		wrong.add("the URL has a fragment, which means nothing here (a # in the password is written %%23)")
	}
	var cfg Config
	if u.User != nil {
		cfg.Username = u.User.Username()
		cfg.Password, _ = u.User.Password()
	}
	host, port, credentials := cfg.setScheme(u, &wrong)
	cfg.Addr = net.JoinHostPort(host, port)
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		wrong.add("the query cannot be parsed")
	}
	for _, key := range slices.Sorted(maps.Keys(query)) {
		if len(query[key]) > 1 {
			wrong.add("%q is set twice", key)
		} else if err := cfg.setParam(key, query.Get(key)); err != nil {
			wrong = append(wrong, err)
		}
	}
	if host == "" {
		wrong.add("the URL has no host")
	} else if port != "" { // without a port the scheme is wrong
		wrong.splitAddr(cfg.Addr)
	}
	if credentials {
		wrong.inCredentials(cfg, host)
	}
	wrong.inModes(cfg, port)
	wrong.inLimits(cfg)
	if len(wrong) > 0 {
		return fail()
	}
	return cfg, nil
}

// parseMistake says what is wrong with a URL that url.Parse refuses. It does not use the text of err, which quotes the URL with
// the password.
func parseMistake(err error) string {
	text := err.Error()
	if e, ok := errors.AsType[*url.Error](err); ok {
		text = e.Err.Error()
	}
	if _, ok := errors.AsType[url.EscapeError](err); ok {
		return "a % in it is not followed by two hexadecimal digits (a % itself is written %25)"
	}
	for _, m := range []struct{ begin, say string }{
		{"invalid port", "the port is not a number, or there is a / # or ? in the password"},
		{"net/url: invalid userinfo", "a character in user or password is not allowed there"},
		{"net/url: invalid control character", "it has a control character"},
		{"invalid character", "a character in the host is not allowed there"},
		{"missing ']'", "an IPv6 address is not closed by ]"},
		{"first path segment", "it has no scheme"},
		{"missing protocol scheme", "it has no scheme"},
	} {
		if strings.HasPrefix(text, m.begin) {
			return m.say
		}
	}
	return "it does not have the form of a URL"
}

// setScheme applies the scheme, and returns host, port, and whether the credentials must still be checked.
func (c *Config) setScheme(u *url.URL, wrong *mistakes) (host, port string, credentials bool) {
	host, port = u.Hostname(), u.Port()
	switch u.Scheme {
	case "smtps":
		c.TLS, port = TLSImplicit, cmp.Or(port, "465")
	case "smtp":
		c.TLS, port = TLSByPort, cmp.Or(port, "587")
	case "smtp+insecure":
		c.TLS, port = TLSNone, cmp.Or(port, "25")
		c.AllowInsecureAuth = c.Password != ""
	default:
		relay, ok := preset.ByScheme(u.Scheme)
		if !ok {
			wrong.add("scheme %q: want smtps, smtp, smtp+insecure or that of a relay (%s)", u.Scheme, strings.Join(preset.Schemes(), ", "))
			return host, port, true
		}
		port = cmp.Or(port, relay.Port)
		at, err := relay.At(host)
		if err != nil {
			*wrong, at = append(*wrong, err), relay.Host
		}
		host = at
		if err := c.use(relay); err != nil {
			*wrong = append(*wrong, err)
			return host, port, false
		}
	}
	return host, port, true
}

// use fills in the limits and the user name of a preset relay.
func (c *Config) use(r preset.Relay) error {
	c.Limits = Limits{MaxConns: r.MaxConns, MaxMessagesPerConn: r.MaxMessagesPerConn, MaxRecipients: r.MaxRecipients}
	needed := r.Username != "" || r.WhoAreYou != "" || r.TokenTwice
	switch {
	case needed && c.Password == "":
		return fmt.Errorf("the URL has no password: want %s://%s:SECRET@, with the secret after the colon", r.Scheme, map[bool]string{true: "USER"}[r.WhoAreYou != ""])
	case r.WhoAreYou != "" && c.Username == "":
		return fmt.Errorf("the URL has no user name: want %s before the colon", r.WhoAreYou)
	case r.TokenTwice && c.Username == "":
		c.Username = c.Password
	case c.Username == "":
		c.Username = r.Username
	}
	return nil
}

// setParam sets the field for one parameter of the query.
func (c *Config) setParam(key, value string) error {
	var err error
	want := ""
	switch to := c.param(key).(type) {
	case *int:
		want = "a whole number"
		*to, err = strconv.Atoi(value)
	case *float64:
		want = "a number"
		*to, err = strconv.ParseFloat(value, 64)
	case *time.Duration:
		want = "a duration such as 30s"
		*to, err = time.ParseDuration(value)
	case *bool:
		want = "on or off"
		*to, err = word(value, map[string]bool{"on": true, "off": false})
	case *Pipelining:
		want = "auto, within or off"
		*to, err = word(value, map[string]Pipelining{"auto": PipelineAuto, "across": PipelineAuto, "within": PipelineWithin, "off": PipelineOff})
	case *TLSMode:
		want = "implicit, starttls, opportunistic or none"
		var mode TLSMode
		mode, err = word(value, map[string]TLSMode{"implicit": TLSImplicit, "starttls": TLSStartTLS, "opportunistic": TLSOpportunistic, "none": TLSNone})
		if err == nil && *to != TLSByPort && *to != mode {
			return fmt.Errorf("tls=%s: the URL's scheme says %v; use smtp://", value, *to)
		}
		*to = mode
	case *string:
		*to = value
	case func(string) error:
		return to(value)
	default:
		return fmt.Errorf("unknown parameter %q", key)
	}
	if err != nil {
		return fmt.Errorf("%s=%q: want %s", key, value, want)
	}
	return nil
}

// word looks up value in words.
func word[T any](value string, words map[string]T) (T, error) {
	v, ok := words[value]
	if !ok {
		return v, errors.ErrUnsupported
	}
	return v, nil
}

// param returns a pointer to the field that a parameter of the query sets, or a func that sets it; nil if the parameter is unknown.
func (c *Config) param(key string) any {
	for _, group := range []func(string) any{c.limitParam, c.retryParam, c.modeParam, c.timeoutParam} {
		if to := group(key); to != nil {
			return to
		}
	}
	return nil
}

func (c *Config) limitParam(key string) any {
	switch key {
	case "max_conns":
		return &c.Limits.MaxConns
	case "max_messages":
		return &c.Limits.MaxMessagesPerConn
	case "max_recipients":
		return &c.Limits.MaxRecipients
	case "max_in_flight":
		return &c.MaxInFlight
	case "max_waiting":
		return &c.Limits.MaxWaiting
	case "rate":
		return &c.Limits.Rate
	case "max_idle":
		return &c.Limits.MaxIdleTime
	case "max_age":
		return &c.Limits.MaxConnAge
	}
	return nil
}

func (c *Config) retryParam(key string) any {
	switch key {
	case "max_attempts":
		return &c.Retry.MaxAttempts
	case "min_backoff":
		return &c.Retry.MinBackoff
	case "max_backoff":
		return &c.Retry.MaxBackoff
	case "retry_4xx":
		return &c.Retry.On4xx
	}
	return nil
}

func (c *Config) modeParam(key string) any {
	switch key {
	case "pipelining":
		return &c.Pipelining
	case "chunking":
		return &c.Chunking
	case "tls":
		return &c.TLS
	case "insecure_auth":
		return &c.AllowInsecureAuth
	case "ca":
		return c.trust
	case "server_name":
		return &c.ownTLSConfig().ServerName
	case "local_name":
		return &c.LocalName
	case "name":
		return &c.Name
	}
	return nil
}

func (c *Config) timeoutParam(key string) any {
	switch key {
	case "dial_timeout":
		return &c.Timeouts.Dial
	case "greeting_timeout":
		return &c.Timeouts.Greeting
	case "tls_timeout":
		return &c.Timeouts.TLS
	case "command_timeout":
		return &c.Timeouts.Command
	case "data_timeout":
		return &c.Timeouts.Data
	case "write_timeout":
		return &c.Timeouts.Write
	case "final_reply_timeout":
		return &c.Timeouts.FinalReply
	case "overlap_timeout":
		return &c.Timeouts.Overlap
	case "drain_timeout":
		return &c.Timeouts.Drain
	case "quit_timeout":
		return &c.Timeouts.Quit
	case "outage_timeout":
		return &c.Timeouts.Outage
	}
	return nil
}

// ownTLSConfig returns c.TLSConfig, and makes one if it is nil.
func (c *Config) ownTLSConfig() *tls.Config {
	if c.TLSConfig == nil {
		c.TLSConfig = &tls.Config{}
	}
	return c.TLSConfig
}

// trust sets the certificates of a PEM file as the trusted roots.
func (c *Config) trust(file string) error {
	pem, err := os.ReadFile(file)
	if cause, ok := errors.AsType[*fs.PathError](err); ok {
		err = cause.Err // without the name, which is quoted below
	}
	roots := x509.NewCertPool()
	if err == nil && !roots.AppendCertsFromPEM(pem) {
		err = errors.New("there is no certificate in PEM form in the file")
	}
	if err != nil {
		return fmt.Errorf("ca=%q: %w", file, err)
	}
	c.ownTLSConfig().RootCAs = roots
	return nil
}
