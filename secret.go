package smtprelay

import (
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/smtprelay/smtprelay/internal/scrub"
)

const redacted = scrub.Redacted

// secret is a text that does not print. It stands behind a func, since fmt prints the unexported fields of a struct
// without asking their methods.
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
	if c.Username == c.Password { // Postmark wants its token in both
		c.Username = redacted
	}
	c.Password = redacted
	return c
}

// Format implements fmt.Formatter: it prints the Config without its password.
func (c Config) Format(f fmt.State, verb rune) {
	type plain Config // has no Format
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

// MarshalJSON implements json.Marshaler: it writes what can be written of the Config, without its password.
func (c Config) MarshalJSON() ([]byte, error) {
	c = c.hidden()
	return json.Marshal(struct {
		Name, Addr, Username, Password, TLS, LocalName string
		Limits                                         Limits
		Retry                                          Retry
		Timeouts                                       Timeouts
	}{c.Name, c.Addr, c.Username, c.Password, c.TLS.String(), c.LocalName, c.Limits, c.Retry, c.Timeouts})
}
