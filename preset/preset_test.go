// Here belongs what package preset says of each relay: that New takes it, that the README, docs/relays.md and ParseURL say the same.
package preset_test

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
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

// sections are those of docs/relays.md, by the name of the relay: the lines of its list by their first word.
func sections(t *testing.T) map[string]map[string]string {
	text, err := os.ReadFile("../docs/relays.md")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]map[string]string)
	for _, section := range strings.Split(string(text), "\n## ")[1:] {
		lines := make(map[string]string)
		for line := range strings.Lines(section) {
			if what, said, ok := strings.Cut(strings.TrimPrefix(line, "- "), ": "); ok && strings.HasPrefix(line, "- ") {
				lines[what] = said
			}
		}
		if name, _, _ := strings.Cut(section, "\n"); len(lines) > 0 {
			all[name] = lines
		}
	}
	return all
}

// spans returns what stands in code in a line.
func spans(line string) (all []string) {
	for _, m := range inCode.FindAllStringSubmatch(line, -1) {
		all = append(all, m[1])
	}
	return all
}

func TestPageOfRelaysSaysOfEachWhatItsPresetDoes(t *testing.T) {
	all, functions := sections(t), make(map[string][]smtprelay.Config)
	for _, p := range presets {
		name := cmp.Or(p.row, "Mailpit")
		functions[name] = append(functions[name], p.cfg)
	}
	for name, cfgs := range functions {
		section := all[name]
		if section == nil {
			t.Errorf("docs/relays.md has no section on %s", name)
			continue
		}
		var addrs []string
		for _, cfg := range cfgs {
			addrs = append(addrs, cfg.Addr)
			said := make(map[string]string)
			for _, m := range figures.FindAllStringSubmatch(section["Limits of the preset"], -1) {
				said[m[2]] = strings.ReplaceAll(m[1], ",", "")
			}
			for what, n := range map[string]int{"connections": cfg.Limits.MaxConns, "messages": cfg.Limits.MaxMessagesPerConn, "recipients": cfg.Limits.MaxRecipients} {
				if got := cmp.Or(said[what], "0"); got != fmt.Sprint(n) {
					t.Errorf("%s: %d %s, and %s in docs/relays.md", name, n, what, got)
				}
			}
			if user := cfg.Username; user != "" && user != "user" && user != "pass" && !slices.Contains(spans(section["Credentials"]), user) {
				t.Errorf("%s: docs/relays.md does not tell the user name %s", name, user)
			}
		}
		if got := spans(section["Address"]); !slices.Equal(got, addrs) {
			t.Errorf("%s: the presets are for %q, docs/relays.md is for %q", name, addrs, got)
		}
		for i, url := range spans(section["URL"]) {
			if got, err := smtprelay.ParseURL(url); err != nil || got.Addr != addrs[i] || !reflect.DeepEqual(got.Limits, cfgs[i].Limits) {
				t.Errorf("%s: got %+v, %v, want %s", url, got, err, addrs[i])
			}
		}
		if section["Source"] == "" {
			t.Errorf("%s: docs/relays.md names no source", name)
		}
	}
}

func TestPageOfRelaysNamesEachFunctionAndSource(t *testing.T) {
	page, err := os.ReadFile("../docs/relays.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("preset.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^func ([A-Z]\w*)\(`).FindAllStringSubmatch(string(source), -1) {
		if !strings.Contains(string(page), "`preset."+m[1]+"(") {
			t.Errorf("docs/relays.md does not name %s", m[1])
		}
	}
	table, err := os.ReadFile("../internal/preset/preset.go")
	if err != nil {
		t.Fatal(err)
	}
	comments := strings.ReplaceAll(string(table), "\n\t// ", " ")
	for name, section := range sections(t) {
		for _, m := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(section["Source"], -1) {
			if !strings.Contains(comments, `"`+m[1]+`"`) {
				t.Errorf("%s: the table of presets has no source %q", name, m[1])
			}
		}
	}
}

func TestPortOfImplicitTLSCanBeAddedToAPresetsURL(t *testing.T) {
	cfg, err := smtprelay.ParseURL("resend://:KEY@:465")
	if err != nil || cfg.Addr != "smtp.resend.com:465" || cfg.TLS != smtprelay.TLSByPort {
		t.Errorf("got %+v, %v", cfg, err)
	}
}

func TestARegionThatIsNoneReachesNobody(t *testing.T) {
	for _, region := range []string{"", "evil.example/", "EU", "a@b", "-"} {
		if cfg := preset.SES(region, "u", "p"); !strings.Contains(cfg.Addr, table.Region) {
			t.Errorf("%q: got %s", region, cfg.Addr)
		}
	}
}
