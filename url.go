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
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	fail := func() (Config, error) {
		return Config{}, &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: errors.Join(mistakes...), permanent: true}
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

func orPort(port, def string) string {
	if port == "" {
		return def
	}
	return port
}
