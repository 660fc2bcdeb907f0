package smtprelay

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

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
	var wrong mistakes
	fail := func() (Config, error) {
		return Config{}, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: errors.Join(wrong...), permanent: true}
	}
	if trimmed := strings.TrimSpace(rawURL); rawURL != trimmed {
		wrong.add("the URL begins or ends with white space; one read from a file often has a line end too many")
		rawURL = trimmed
	}
	u, err := url.Parse(rawURL)
	switch {
	case err != nil:
		wrong.add("the URL cannot be parsed: %s; want smtps://user:password@host:port with special characters in user and password percent-encoded", parseMistake(err))
		return fail()
	case isPath(rawURL):
		wrong.add("the URL is a path: Config.Dial is for that; it connects to the socket")
		return fail()
	case u.Scheme == "" || u.Opaque != "": // the scheme of user:password@host is the user
		wrong.add("the URL has no scheme: want smtps://, smtp:// or smtp+insecure://")
		return fail()
	case strings.Contains(u.Path+u.Fragment+u.RawQuery, "@") || strings.Contains(u.RawFragment, "@"):
		// Nothing else is said: whatever there is may be a piece of the password.
		wrong.add("the URL has an @ behind the first / # or ?: one of these stands in the password, and is not percent-encoded (%%2F, %%23, %%3F)")
		return fail()
	}
	if u.Path != "" && u.Path != "/" {
		wrong.add("the URL has a path, which means nothing here (a / in the password is written %%2F)")
	}
	if u.Fragment != "" {
		wrong.add("the URL has a fragment, which means nothing here (a # in the password is written %%23)")
	}
	var cfg Config
	port, ok := cfg.setScheme(u.Scheme)
	if !ok {
		wrong.add("scheme %q: want smtps, smtp or smtp+insecure", u.Scheme)
	}
	host := u.Hostname()
	if host == "" {
		wrong.add("the URL has no host")
		host = "relay.invalid" // so that the rest can be checked
	}
	if u.Port() != "" {
		port = u.Port()
	}
	cfg.Addr = net.JoinHostPort(host, port)
	if u.User != nil {
		cfg.Username = u.User.Username()
		cfg.Password, _ = u.User.Password()
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		wrong.add("the query cannot be parsed")
	}
	for _, key := range slices.Sorted(maps.Keys(query)) {
		if len(query[key]) > 1 {
			wrong.add("%q stands twice", key)
		} else if err := cfg.setParam(key, query.Get(key)); err != nil {
			wrong = append(wrong, err)
		}
	}
	if _, err := cfg.check(); err != nil {
		wrong = append(wrong, err)
	}
	if len(wrong) > 0 {
		return fail()
	}
	return cfg, nil
}

// parseMistake says what is wrong with a URL that url.Parse refuses with err, which quotes the URL, password and all.
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
	return "it has not the form of a URL"
}

// setScheme sets what the scheme says, and returns its default port.
func (c *Config) setScheme(scheme string) (port string, ok bool) {
	switch scheme {
	case "smtps":
		c.TLS, port = TLSImplicit, "465"
	case "smtp":
		c.TLS, port = TLSByPort, "587"
	case "smtp+insecure":
		c.TLS, port = TLSNone, "25"
	default:
		return "587", false
	}
	return port, true
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
		return number(&c.MaxInFlight)
	case "max_attempts":
		return number(&c.Retry.MaxAttempts)
	case "max_idle":
		return duration(&c.Limits.MaxIdleTime)
	case "max_age":
		return duration(&c.Limits.MaxConnAge)
	case "local_name":
		c.LocalName = value
	case "pipelining":
		modes := map[string]Pipelining{"across": PipelineAuto, "within": PipelineWithin, "off": PipelineOff}
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
