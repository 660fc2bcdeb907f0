// Here belongs what package preset says of each relay: that New takes it, that the README and ParseURL say the same.
package preset_test

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	table "github.com/smtprelay/smtprelay/internal/preset"
	"github.com/smtprelay/smtprelay/preset"
)

func auth(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return nil, nil }

// presets are all there are: the row of the README that each belongs to, and the same as a URL.
var presets = []struct {
	row, url string
	cfg      smtprelay.Config
}{
	{"SendGrid", "sendgrid://:pass@", preset.SendGrid("pass")},
	{"SendGrid", "sendgrid://:pass@eu", preset.SendGridEU("pass")},
	{"Amazon SES", "ses://user:pass@eu-west-1", preset.SES("eu-west-1", "user", "pass")},
	{"Mailgun", "mailgun://user:pass@", preset.Mailgun("user", "pass")},
	{"Mailgun", "mailgun://user:pass@eu", preset.MailgunEU("user", "pass")},
	{"Postmark", "postmark://:pass@", preset.Postmark("pass")},
	{"Postmark", "postmark://:pass@broadcasts", preset.PostmarkBroadcasts("pass")},
	{"Mailjet", "mailjet://user:pass@", preset.Mailjet("user", "pass")},
	{"Brevo", "brevo://user:pass@", preset.Brevo("user", "pass")},
	{"Resend", "resend://:pass@", preset.Resend("pass")},
	{"SparkPost", "sparkpost://:pass@", preset.SparkPost("pass")},
	{"SparkPost", "sparkpost://:pass@eu", preset.SparkPostEU("pass")},
	{"Mailtrap", "mailtrap://:pass@", preset.Mailtrap("pass")},
	{"Gmail", "gmail://user:pass@", preset.Gmail("user", "pass")},
	{"Microsoft 365", "", preset.Microsoft365(auth)},
	{"Postfix, Exim … on the LAN", "", preset.LAN("mail.lan")},
	{"", "mailpit://", preset.Mailpit()},
}

func TestEachPresetIsGoodAndItsURLSaysTheSame(t *testing.T) {
	schemes := map[string]bool{"microsoft365": true} // by a password, which its function does not have
	for _, p := range presets {
		client, err := smtprelay.New(p.cfg)
		if err != nil {
			t.Errorf("%s: %v", p.row, err)
			continue
		}
		client.Close()
		if p.url == "" {
			continue
		}
		scheme, _, _ := strings.Cut(p.url, ":")
		schemes[scheme] = true
		if got, err := smtprelay.ParseURL(p.url); err != nil || !reflect.DeepEqual(got, p.cfg) {
			t.Errorf("%s: got %+v, %v, want %+v", p.url, got, err, p.cfg)
		}
	}
	for _, scheme := range table.Schemes() {
		if !schemes[scheme] {
			t.Errorf("%s:// has no function", scheme)
		}
	}
}

// readme is the README's table of relays: the cells of each row, by its first.
func readme(t *testing.T) map[string][]string {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Relays\n")
	if !ok {
		t.Fatal("the README has no section on relays")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	rows := make(map[string][]string)
	for line := range strings.Lines(section) {
		if cells := strings.Split(strings.TrimSpace(line), " | "); len(cells) == 4 && !strings.Contains(line, "---") && !strings.HasPrefix(line, "| relay ") {
			rows[strings.TrimPrefix(cells[0], "| ")] = cells
		}
	}
	return rows
}

var (
	inCode  = regexp.MustCompile("`([^`]+)`")
	figures = regexp.MustCompile(`([0-9,]+) (connections|messages|recipients)`)
)

func TestReadmeSaysOfEachRelayWhatItsPresetDoes(t *testing.T) {
	rows := readme(t)
	functions := make(map[string][]smtprelay.Config)
	for _, p := range presets {
		functions[p.row] = append(functions[p.row], p.cfg)
	}
	for name, cells := range rows {
		var addrs []string
		for _, m := range inCode.FindAllStringSubmatch(cells[1], -1) {
			addrs = append(addrs, strings.Replace(m[1], table.Region, "eu-west-1", 1))
		}
		var got []string
		for _, cfg := range functions[name] {
			got = append(got, cfg.Addr)
		}
		if !reflect.DeepEqual(got, addrs) {
			t.Errorf("%s: the presets are for %q, the README's row is for %q", name, got, addrs)
		}
		user, _, _ := strings.Cut(cells[2], " / ")
		for _, cfg := range functions[name] {
			if m := inCode.FindStringSubmatch(user); m != nil && !strings.ContainsAny(m[1], "<A") && m[1] != cfg.Username {
				t.Errorf("%s: user name %q, and %q in the README", name, cfg.Username, m[1])
			}
			if twice := strings.Contains(cells[2], "as both"); twice != (cfg.Password != "" && cfg.Username == cfg.Password) {
				t.Errorf("%s: user name and password are the same: %v in the README", name, twice)
			}
		}
		checkFigures(t, name, cells[3], functions[name])
	}
	for _, p := range presets {
		if p.row != "" && rows[p.row] == nil {
			t.Errorf("%s is not in the README's table", p.row)
		}
	}
}

// checkFigures compares the limits of presets with a cell of the README. What SendGrid's page says today is not what its
// preset has, and a Postfix or an Exim may have been set otherwise.
func checkFigures(t *testing.T, name, cell string, cfgs []smtprelay.Config) {
	if name == "SendGrid" || strings.HasPrefix(name, "Postfix") {
		return
	}
	documented := make(map[string]string)
	for _, m := range figures.FindAllStringSubmatch(cell, -1) {
		documented[m[2]] = m[1]
	}
	for _, cfg := range cfgs {
		for what, n := range map[string]int{"connections": cfg.Limits.MaxConns, "messages": cfg.Limits.MaxMessagesPerConn, "recipients": cfg.Limits.MaxRecipients} {
			if got := fmt.Sprint(n); n == 0 && documented[what] != "" || n != 0 && documented[what] != got {
				t.Errorf("%s: %d %s, and %q in the README", name, n, what, documented[what])
			}
		}
	}
}

func TestARegionThatIsNoneReachesNobody(t *testing.T) {
	for _, region := range []string{"", "evil.example/", "EU", "a@b", "-"} {
		if cfg := preset.SES(region, "u", "p"); !strings.Contains(cfg.Addr, table.Region) {
			t.Errorf("%q: got %s", region, cfg.Addr)
		}
	}
}
