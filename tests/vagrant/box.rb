# Settings for the box of tests/vagrant/box.sh. Vagrant reads this file before the project's Vagrantfile.
Vagrant.configure("2") do |config|
  config.vm.boot_timeout = 600
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = ENV.fetch("IPSECGATE_TEST_DRIVER", "qemu")
    libvirt.kernel = File.expand_path("vmlinuz", __dir__)
    libvirt.initrd = File.expand_path("initrd.img", __dir__)
    libvirt.cmd_line = "root=/dev/vda rw net.ifnames=0 mitigations=off audit=0 apparmor=0 " \
                       "console=ttyS0 no_timer_check tsc=reliable random.trust_cpu=on quiet"
  end
end
